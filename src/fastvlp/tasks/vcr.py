"""Choosing the right answer to a question, and the right rationale for it (VCR, Zellers et al., arXiv 1811.10830; UNITER, arXiv
1909.11740, section 4; released code: model/vcr.py)"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.data.pairs import Split
from fastvlp.data.records.schema import clean_text
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Fit
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.uncertainty import with_error
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.tasks.heads import HeadConfig, image_states
from fastvlp.tasks.interface import FineTuned, Task
from fastvlp.tasks.item_data import ItemData
from fastvlp.tasks.items import Item, ItemMaker, batches_in_order, read_items
from fastvlp.tasks.nlvr import Truth

# Rows of the type table for a question, an answer and a rationale; row 1 is that of regions.
TEXT_TYPES = (0, 2, 3)


@dataclass(frozen=True, kw_only=True)
class VCRData(ItemData):
    """Questions with answers and rationales to choose from. Each answer after its question, and each rationale after the
    question and the right answer, is an item, right or wrong by itself; the one that scores best is chosen."""

    choices: str = "choices"
    """Field of the records with a list of {question, answers, right, rationales, right_rationale}; the last two may be
    missing. choices_zh has the Chinese ones."""
    fit: Fit = "squash"
    """How an image becomes a square."""

    def read(self, shards: Shards) -> list[Item]:
        questions = read_items(shards, self.choices, "question", "answers")
        return [choice for number, item in enumerate(questions) for choice in _choices(item, number)]

    def target(self, items: list[Item]) -> Tensor:
        """1 where the answer or the rationale is right: int64 [items]."""
        return torch.tensor([int(item.entry["label"]) for item in items], dtype=torch.int64)


def _choices(item: Item, number: int) -> Iterator[Item]:
    """The answers of question `number`, then its rationales. The entry of each says whether it is right, of which question it
    is, and which of the two it is."""
    if not item.text:
        yield item
        return
    answers, right = _texts(item.entry, "answers", "right")
    if fault := _fault("answers", answers, right):
        yield Item(item.record, "", {}, f"{item.text!r}: {fault}")
        return
    for k, answer in enumerate(answers):
        yield item._replace(following=(answer,), entry={"label": k == right, "question": number, "part": "answer"})
    if item.entry.get("rationales") is None:
        return
    rationales, right_rationale = _texts(item.entry, "rationales", "right_rationale")
    if fault := _fault("rationales", rationales, right_rationale):
        yield Item(item.record, "", {}, f"{item.text!r}: {fault}")
        return
    for k, rationale in enumerate(rationales):
        entry = {"label": k == right_rationale, "question": number, "part": "rationale"}
        yield item._replace(following=(answers[right], rationale), entry=entry)


def _texts(entry: Mapping[str, Any], field: str, right: str) -> tuple[list[str], Any]:
    """The texts of a list, "" for what is no text, and the place of the right one."""
    texts = entry[field] if isinstance(entry[field], list) else []
    return [clean_text(text) or "" for text in texts], entry.get(right)


def _fault(field: str, texts: list[str], right: Any) -> str | None:
    if len(texts) < 2 or not all(texts):
        return f"{field} are not a list of two texts or more"
    if not isinstance(right, int) or not 0 <= right < len(texts):
        return f"the right one of its {len(texts)} {field} is {right!r}"
    return None


@dataclass(frozen=True, kw_only=True)
class VCROptions:
    """Options of the objective that the task offers too."""

    kinds: bool = True
    """In a single stream the words of answers and rationales have token types of their own; else they have the question's."""


@dataclass(frozen=True, kw_only=True)
class VCRConfig(VCROptions, HeadConfig):
    """A choice among answers and rationales."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> VCR:
        return VCR(self, model)


class VCR(Truth):
    """Cross-entropy over wrong and right for each choice by itself (released code)."""

    def __init__(self, config: VCRConfig, model: ModelConfig):
        single, width = model.single, model.text.width
        head = None
        if single is not None:
            norm = nn.LayerNorm(2 * width, eps=single.layer.eps)
            head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), norm, nn.Linear(2 * width, 2))
        if single is not None and config.kinds and single.types <= max(TEXT_TYPES):
            raise UserError(
                f"answers and rationales have token types of their own; set model.single.types to {max(TEXT_TYPES) + 1}"
            )
        super().__init__(config, model, images=1, head=head)
        self.kinds = config.kinds

    @torch.no_grad()
    def begin(self, model: VLModel) -> None:
        """The types of answers and rationales start as copies of the question's."""
        if model.config.single is not None and self.kinds:
            model.single.kinds[2:4] = model.single.kinds[0]

    def pooled(
        self,
        model: VLModel,
        image_BKD: Tensor,
        ids_BL: Tensor,
        length_B: Tensor,
        regions: Regions | None,
        slot_B: Tensor | None = None,
    ) -> Tensor:
        if self.pool is not None or not self.kinds:
            return super().pooled(model, image_BKD, ids_BL, length_B, regions, slot_B)
        kind_BL = text_types(ids_BL, model.config.text.eos)
        return model.read_regions(image_BKD, regions, ids_BL, length_B, kind_BL=kind_BL).pooled


def text_types(ids_BL: Tensor, eos: int) -> Tensor:
    """Types of words by how many </s> come before them: question, answer, rationale -> [B L]."""
    end_BL = ids_BL == eos
    part_BL = (end_BL.cumsum(1) - end_BL.long()).clamp(max=len(TEXT_TYPES) - 1)
    return torch.tensor(TEXT_TYPES, device=ids_BL.device)[part_BL]


def measure(model: VLModel, objective: VCR, items: ItemMaker, batch_size: int) -> dict[str, float]:
    """answer, also called accuracy: share of questions whose best-scored answer is right (Q->A). rationale: the same for
    rationales, given the right answer (QA->R). both: share of questions with both right (Q->AR). Of several that score the
    same, or not a number, each counts in part: the order of the choices says nothing. chance: accuracy of an answer drawn at
    random."""
    scores: list[float] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches_in_order(items, batch_size, device):
            scores += objective.logits(model, image_states(model, batch), batch)[:, 1].tolist()
    right: dict[str, dict[int, float]] = {"answer": {}, "rationale": {}}
    records: list[int] = []
    chance: list[float] = []
    for (question, part), rows in groupby(
        zip(items.items, scores), lambda row: (row[0].entry["question"], row[0].entry["part"])
    ):
        choices = list(rows)
        if part == "answer":
            records.append(choices[0][0].record)
            chance.append(1 / len(choices))
        right[part][question] = share_of_right([(score, item.entry["label"]) for item, score in choices])
    shares = {name: _share(list(values.values())) for name, values in right.items() if values}
    rationales = right["rationale"]
    both = {"both": _share([right["answer"][q] * rationales[q] for q in rationales])} if rationales else {}
    scored = with_error(list(right["answer"].values()), records) | {"chance": _share(chance)}
    return scored | shares | both | {"count": float(len(right["answer"]))}


def share_of_right(choices: Sequence[tuple[float, bool]]) -> float:
    """The share of right choices among those with the highest score; NaN is the lowest."""
    scores = [-math.inf if math.isnan(score) else score for score, _ in choices]
    return _share([float(right) for score, (_, right) in zip(scores, choices) if score == max(scores)])


def _share(right: Sequence[float]) -> float:
    return sum(right) / len(right)


@dataclass(frozen=True, kw_only=True)
class VCRTask(VCROptions, Task):
    """Choose the right answer to a question, and the right rationale for the answer.

    Question, answer and rationale are one text. It is cut after 224 tokens unless `max_length` is given.
    """

    name = "vcr"
    data = VCRData
    config = VCRConfig
    field = "choices"
    answer = "right"
    token_types = max(TEXT_TYPES) + 1
    # A row of UNITER's released code has 220 word pieces, <s> and three </s>.
    max_length = 224

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        return measure(tuned.saved.model, tuned.objective, tuned.items(split), tuned.data.batch_size)
