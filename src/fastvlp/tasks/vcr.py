"""Which answer to a question is right, and which rationale for it? (VCR, Zellers et al., arXiv 1811.10830; UNITER, arXiv
1909.11740, section 4; released code: model/vcr.py, spec uniter-brivl.md A4.2)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.data.pairs import Fit, Split
from fastvlp.data.records.schema import clean_text
from fastvlp.data.records.shards import Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.mode import evaluating
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.tasks.nlvr import Truth
from fastvlp.tasks.task import HeadConfig, Item, ItemData, ItemMaker, batches, encoded, read_items

# Rows of the type table: of a question, an answer, a rationale; row 1 is the regions'.
KINDS = (0, 2, 3)


@dataclass(frozen=True, kw_only=True)
class VCRData(ItemData):
    """choices: the field of a record with its list of {question, answers, right, rationales, right_rationale}; the last two
    may be missing. Each answer after its question, and each rationale after question and right answer, is a row, right
    or wrong by itself, as in training; what is chosen is the one that scores best."""

    choices: str = "choices"
    fit: Fit = "squash"

    def read(self, shards: Shards) -> list[Item]:
        asked = read_items(shards, self.choices, "question", "answers")
        return [row for number, item in enumerate(asked) for row in _rows(item, number)]

    def target(self, items: list[Item]) -> Tensor:
        """int64 [items]: 1 where the answer or the rationale is right."""
        return torch.tensor([int(item.told["label"]) for item in items], dtype=torch.int64)


def _rows(item: Item, number: int) -> Iterator[Item]:
    """`told`: whether it is right, of which question, and whether of its answers or of its rationales."""
    if not item.text:
        yield item
        return
    answers, right = _options(item.told, "answers", "right")
    if wrong := _fault("answers", answers, right):
        yield Item(item.record, "", {}, f"{item.text!r}: {wrong}")
        return
    for k, answer in enumerate(answers):
        yield item._replace(more=(answer,), told={"label": k == right, "question": number, "of": "answer"})
    if item.told.get("rationales") is None:
        return
    reasons, why = _options(item.told, "rationales", "right_rationale")
    if wrong := _fault("rationales", reasons, why):
        yield Item(item.record, "", {}, f"{item.text!r}: {wrong}")
        return
    for k, reason in enumerate(reasons):
        told = {"label": k == why, "question": number, "of": "rationale"}
        yield item._replace(more=(answers[right], reason), told=told)


def _options(told: Mapping[str, Any], field: str, right: str) -> tuple[list[str], Any]:
    options = told[field] if isinstance(told[field], list) else []
    return [clean_text(option) or "" for option in options], told.get(right)


def _fault(field: str, options: list[str], right: Any) -> str | None:
    if len(options) < 2 or not all(options):
        return f"{field} are not a list of two texts or more"
    if not isinstance(right, int) or not 0 <= right < len(options):
        return f"the right one of its {len(options)} {field} is {right!r}"
    return None


@dataclass(frozen=True, kw_only=True)
class VCRConfig(HeadConfig):
    """kinds: in a single stream answers and rationales have types of their own; False: all words have the question's."""

    kinds: bool = True

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
        if single is not None and config.kinds and single.types <= max(KINDS):
            raise UserError(f"answers and rationales have types of their own; set model.single.types {max(KINDS) + 1}")
        super().__init__(config, model, images=1, head=head)
        self.kinds = config.kinds

    @torch.no_grad()
    def begin(self, model: VLModel) -> None:
        """The types of answers and rationales start as the question's."""
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
        kind_BL = text_kinds(ids_BL, model.config.text.eos)
        return model.read_regions(image_BKD, regions, ids_BL, length_B, kind_BL=kind_BL).pooled


def text_kinds(ids_BL: Tensor, eos: int) -> Tensor:
    """Types of words by how many </s> come before them: question, answer, rationale -> [B L]."""
    ended_BL = ids_BL == eos
    part_BL = (ended_BL.cumsum(1) - ended_BL.long()).clamp(max=len(KINDS) - 1)
    return torch.tensor(KINDS, device=ids_BL.device)[part_BL]


def measure(model: VLModel, objective: VCR, made: ItemMaker, batch_size: int) -> dict[str, float]:
    """answer: share of questions whose best-scored answer is right (Q->A). rationale: given the right answer (QA->R). both:
    right in both (Q->AR), as the validation split is scored. accuracy: of the answers."""
    scores: list[float] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches(made, batch_size, device):
            scores += objective.logits(model, encoded(model, batch), batch)[:, 1].tolist()
    right: dict[str, dict[int, bool]] = {"answer": {}, "rationale": {}}
    for (question, part), rows in groupby(
        zip(made.items, scores), lambda row: (row[0].told["question"], row[0].told["of"])
    ):
        best, _ = max(rows, key=lambda row: row[1])
        right[part][question] = best.told["label"]
    found = {name: _share(list(told.values())) for name, told in right.items() if told}
    reasons = right["rationale"]
    both = {"both": _share([right["answer"][q] and reasons[q] for q in reasons])} if reasons else {}
    return {"accuracy": found["answer"]} | found | both | {"count": float(len(right["answer"]))}


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def evaluate(model: VLModel, objective: VCR, data: VCRData, split: Split, tokenizer: Tokenizer) -> dict[str, float]:
    """`measure` on a split; refuses one with an unreadable record."""
    return measure(model, objective, data.strict(split, tokenizer, model.config.image.size), data.batch_size)
