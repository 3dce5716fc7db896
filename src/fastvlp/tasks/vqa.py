"""Visual question answering as choice among frequent answers (VQA v2; spec flm.md section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.pairs import Split
from fastvlp.data.records.schema import answers_fault
from fastvlp.data.records.shards import Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.classification import mean_by
from fastvlp.eval.mode import evaluating
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.objective import Loss
from fastvlp.tasks.task import (
    HeadConfig,
    HeadTask,
    Item,
    ItemData,
    ItemMaker,
    batches,
    encoded,
    read_items,
    target_of,
)


def frequent_answers(folder: str, questions: str = "questions", most: int = 3129) -> tuple[str, ...]:
    """The answers of a training split with the highest summed scores, best first; equal ones in the order of their
    spelling. 3129 is VQA v2's usual number."""
    totals: dict[str, float] = {}
    for item in read_items(Shards(folder), questions, "question", "answers", answers_fault):
        for answer, score in _answers(item).items():
            totals[answer] = totals.get(answer, 0.0) + score
    if not totals:
        raise UserError(f"{folder}: no question in {questions!r} has answers; VQA needs them for training")
    return tuple(sorted(totals, key=lambda answer: (-totals[answer], answer))[:most])


def _answers(item: Item) -> dict[str, float]:
    """{answer: score in 0..1}."""
    return {str(answer): float(score) for answer, score in item.told.get("answers", {}).items()}


@dataclass(frozen=True, kw_only=True)
class VQAData(ItemData):
    """questions: the field of a record with its list of questions (`questions_zh`: the Chinese ones). answers: what is
    chosen from (`frequent_answers`). Training leaves out a question none of whose answers is among them."""

    answers: tuple[str, ...]
    questions: str = "questions"

    def read(self, shards: Shards) -> list[Item]:
        return read_items(shards, self.questions, "question", "answers", answers_fault)

    def wanted(self, item: Item) -> bool:
        return not item.text or not _answers(item).keys().isdisjoint(self.answers)

    def target(self, items: list[Item]) -> Tensor:
        """float [items answers]: how right each answer is."""
        place = {answer: a for a, answer in enumerate(self.answers)}
        target = torch.zeros(len(items), len(self.answers))
        for i, item in enumerate(items):
            for answer, score in _answers(item).items():
                if answer in place:
                    target[i, place[answer]] = score
        return target


@dataclass(frozen=True, kw_only=True)
class VQAConfig(HeadConfig):
    """answers: how many there are to choose from."""

    answers: int

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> VQA:
        return VQA(self, model)


class VQA(HeadTask):
    abilities = frozenset({"answer"})

    def __init__(self, config: VQAConfig, model: ModelConfig):
        super().__init__(config, model, images=1, outputs=config.answers)
        # One answer of A is right: a start at probability 1/A spares the first steps, which would only lower all of them
        # from 1/2 (Lin et al. 2017, arXiv 1708.02002, section 4.1).
        assert isinstance(self.head, nn.Sequential)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, -math.log(max(1, config.answers - 1)))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"answer": torch.tensor(len(batch), device=batch.ids.device)}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """Binary cross-entropy summed over the answers (mean x number of answers), averaged over questions."""
        logits = self.logits(model, image_BKD, batch)
        total = F.binary_cross_entropy_with_logits(logits, target_of(batch), reduction="sum")
        return {"answer": Loss(total, self.counts(batch)["answer"])}


def choose(scores_A: Tensor, choices: Sequence[str], place: Mapping[str, int]) -> str | None:
    """The best of a question's own choices; None where none of them is among the answers."""
    known = [choice for choice in choices if choice in place]
    return max(known, key=lambda choice: float(scores_A[place[choice]])) if known else None


def measure(
    model: VLModel, objective: VQA, answers: Sequence[str], made: ItemMaker, batch_size: int
) -> dict[str, float]:
    """Accuracies 0..1 over all questions of a maker.

    accuracy: mean score of the chosen answer. accuracy/KIND: of each kind of question. answerable: the best accuracy
    that the answers allow. Where questions come with choices: choice_accuracy, and the share choice_unanswerable whose
    choices are no answers of the training split (they count as wrong).
    """
    place = {answer: a for a, answer in enumerate(answers)}
    scores: list[float] = []
    best: list[float] = []
    chosen: list[tuple[float, bool]] = []
    device = next(model.parameters()).device
    items = iter(made.items)
    with evaluating(model, objective):
        for batch in batches(made, batch_size, device):
            logits = objective.logits(model, encoded(model, batch), batch).cpu()
            target = target_of(batch).cpu()
            scores += target.gather(1, logits.argmax(1, keepdim=True))[:, 0].tolist()
            best += target.max(1).values.tolist()
            for row, item in zip(logits, items):
                if choices := item.told.get("choices"):
                    choice = choose(row, choices, place)
                    chosen.append((_answers(item).get(choice or "", 0.0), choice is None))
    kinds = mean_by(scores, [str(item.told.get("kind", "")) for item in made.items])
    result = {"accuracy": _mean(scores)} | {f"accuracy/{kind}": value for kind, value in kinds.items() if kind}
    result |= {"answerable": _mean(best), "count": float(len(scores))}
    if chosen:
        right, unanswerable = zip(*chosen)
        result |= {"choice_accuracy": _mean(right), "choice_unanswerable": _mean(unanswerable)}
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def evaluate(model: VLModel, objective: VQA, data: VQAData, split: Split, tokenizer: Tokenizer) -> dict[str, float]:
    """`measure` on a split; refuses one with an unreadable record."""
    made = data.strict(split, tokenizer, model.config.image.size)
    return measure(model, objective, data.answers, made, data.batch_size)
