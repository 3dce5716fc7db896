"""Visual question answering as a choice among frequent answers (VQA v2, Goyal et al., arXiv 1612.00837)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.pairs import Split
from fastvlp.data.records.schema import answers_fault, clean_text
from fastvlp.data.records.shards import Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.classification import mean_by
from fastvlp.eval.uncertainty import with_error
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import ModelConfig, Reading, VLModel
from fastvlp.objectives.objective import Loss
from fastvlp.tasks.heads import HeadConfig, HeadObjective, image_states, target_of
from fastvlp.tasks.interface import FineTuned, Task
from fastvlp.tasks.item_data import ItemData
from fastvlp.tasks.items import Item, ItemMaker, batches_in_order, read_items
from fastvlp.tasks.pretrained import Pretrained


def frequent_answers(folder: str, questions: str = "questions", most: int = 3129) -> tuple[str, ...]:
    """The answers of a training split with the highest summed scores, best first; those with equal sums in alphabetical
    order. 3129 is the usual number on VQA v2."""
    totals: dict[str, float] = {}
    for item in read_items(Shards(folder), questions, "question", "answers", answers_fault):
        for answer, score in _answers(item).items():
            totals[answer] = totals.get(answer, 0.0) + score
    if not totals:
        raise UserError(f"{folder}: no question in {questions!r} has answers; VQA needs them for training")
    return tuple(sorted(totals, key=lambda answer: (-totals[answer], answer))[:most])


def _answers(item: Item) -> dict[str, float]:
    """{answer: score in 0..1}."""
    return {str(answer): float(score) for answer, score in item.entry.get("answers", {}).items()}


@dataclass(frozen=True, kw_only=True)
class VQAData(ItemData):
    """Questions with scored answers. Training leaves out a question none of whose answers can be chosen, evaluation one
    without any answers."""

    answers: tuple[str, ...]
    """Answers to choose from, as `frequent_answers` gives them."""
    questions: str = "questions"
    """Field of the records with the questions; questions_zh has the Chinese ones."""

    def read(self, shards: Shards) -> list[Item]:
        return read_items(shards, self.questions, "question", "answers", answers_fault)

    def used_in_training(self, item: Item) -> bool:
        return not item.text or not _answers(item).keys().isdisjoint(self.answers)

    def used_in_evaluation(self, item: Item) -> bool:
        """No answer to the question would be right, whereas an entry with a fault is refused."""
        if item.text:
            return bool(_answers(item))
        is_question = clean_text(item.entry.get("question")) is not None
        return not (is_question and item.entry.get("answers") is None)

    def target(self, items: list[Item]) -> Tensor:
        """Returns the score of each answer: float [items answers]."""
        place = {answer: a for a, answer in enumerate(self.answers)}
        target = torch.zeros(len(items), len(self.answers))
        for i, item in enumerate(items):
            for answer, score in _answers(item).items():
                if answer in place:
                    target[i, place[answer]] = score
        return target


@dataclass(frozen=True, kw_only=True)
class VQAConfig(HeadConfig):
    """A choice among a fixed number of answers."""

    answers: int
    """Number of answers to choose from."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> VQA:
        return VQA(self, model)


class VQA(HeadObjective):
    """The loss of the answers' scores."""

    abilities = frozenset({"answer"})

    def __init__(self, config: VQAConfig, model: ModelConfig):
        super().__init__(config, model, images=1, outputs=config.answers)
        # One of A answers is right. A start at probability 1/A saves the first steps, which would only lower all
        # probabilities from 1/2 (Lin et al. 2017, arXiv 1708.02002, section 4.1).
        assert isinstance(self.head, nn.Sequential)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, -math.log(max(1, config.answers - 1)))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"answer": torch.tensor(len(batch), device=batch.ids.device)}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """Binary cross-entropy, summed over the answers and averaged over the questions."""
        logits = self.logits(model, image_BKD, batch)
        total = F.binary_cross_entropy_with_logits(logits, target_of(batch), reduction="sum")
        return {"answer": Loss(total, self.counts(batch)["answer"])}


def choose(scores_A: Tensor, choices: Sequence[str], place: Mapping[str, int]) -> str | None:
    """The best-scored of a question's own choices; None if none of them is among the answers."""
    possible = [choice for choice in choices if choice in place]
    return max(possible, key=lambda choice: float(scores_A[place[choice]])) if possible else None


def measure(
    model: VLModel, objective: VQA, answers: Sequence[str], items: ItemMaker, batch_size: int
) -> dict[str, float]:
    """Accuracies in 0..1 over the questions that have answers.

    accuracy: mean score of the chosen answer, with its standard_error. chance: the same of always choosing the first of the
    answers, the most frequent one. accuracy/KIND: the same for each kind of question. answerable: the best accuracy that the
    answers allow. unanswered: number of questions without answers, which are left out. Where questions have choices of their
    own, choice_accuracy, choice_chance of a random choice, and choice_unanswerable: the share of questions none of whose
    choices is among the answers; they count as wrong.
    """
    place = {answer: a for a, answer in enumerate(answers)}
    scores: list[float] = []
    first: list[float] = []
    best: list[float] = []
    chosen: list[tuple[float, float, bool]] = []
    device = next(model.parameters()).device
    following = iter(items.items)
    with evaluating(model, objective):
        for batch in batches_in_order(items, batch_size, device):
            logits = objective.logits(model, image_states(model, batch), batch).cpu()
            target = target_of(batch).cpu()
            scores += target.gather(1, logits.argmax(1, keepdim=True))[:, 0].tolist()
            first += target[:, 0].tolist()
            best += target.max(1).values.tolist()
            for row, item in zip(logits, following):
                if choices := item.entry.get("choices"):
                    choice, right = choose(row, choices, place), _answers(item)
                    random = _mean([right.get(one, 0.0) for one in choices])
                    chosen.append((right.get(choice or "", 0.0), random, choice is None))
    kinds = mean_by(scores, [str(item.entry.get("kind", "")) for item in items.items])
    result = with_error(scores, [item.record for item in items.items]) | {"chance": _mean(first)}
    result |= {f"accuracy/{kind}": value for kind, value in kinds.items() if kind}
    result |= {"answerable": _mean(best), "count": float(len(scores)), "unanswered": float(items.left_out)}
    if chosen:
        rights, randoms, unanswerable = zip(*chosen)
        result |= {"choice_accuracy": _mean(rights), "choice_chance": _mean(randoms)}
        result |= {"choice_unanswerable": _mean(unanswerable)}
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class VQATask(Task):
    """Answer questions about an image."""

    name = "vqa"
    data = VQAData
    config = VQAConfig
    field = "questions"
    answer = "answers"

    answers: int = 3129
    """Largest number of answers to choose from: the most frequent answers of the training split."""

    def data_fields(self, train: str, field: str) -> Mapping[str, Any]:
        return {"answers": frequent_answers(train, field, self.answers)}

    def objective(self, data: VQAData, pretrained: Pretrained, reading: Reading | None) -> VQAConfig:
        return VQAConfig(reading=reading or pretrained.reading, bos=pretrained.bos, answers=len(data.answers))

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        data: VQAData = tuned.data
        return measure(tuned.saved.model, tuned.objective, data.answers, tuned.items(split), data.batch_size)
