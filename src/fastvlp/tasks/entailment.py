"""Does an image entail a statement, contradict it, or neither? (SNLI-VE, Xie et al., arXiv 1901.06706; UNITER, arXiv
1909.11740, section 4)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.pairs import Fit, Split
from fastvlp.data.records.schema import LABELS, entailment_fault
from fastvlp.data.records.shards import Shards
from fastvlp.data.tokenize import Tokenizer
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


@dataclass(frozen=True, kw_only=True)
class EntailmentData(ItemData):
    """entailments: the field of a record with its list of labelled statements (`entailments_zh`: the Chinese ones)."""

    entailments: str = "entailments"
    fit: Fit = "squash"

    def read(self, shards: Shards) -> list[Item]:
        return read_items(shards, self.entailments, "text", "label", entailment_fault)

    def target(self, items: list[Item]) -> Tensor:
        """int64 [items]: places in LABELS."""
        return torch.tensor([LABELS.index(item.told["label"]) for item in items], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class EntailmentConfig(HeadConfig):
    """loss: `bce` of each label by itself, summed (UNITER's released code), or `ce` over the three (its paper)."""

    loss: Literal["bce", "ce"] = "bce"

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Entailment:
        return Entailment(self, model)


class Entailment(HeadTask):
    def __init__(self, config: EntailmentConfig, model: ModelConfig):
        super().__init__(config, model, images=1, outputs=len(LABELS))
        self.loss = config.loss

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"label": torch.tensor(len(batch), device=batch.ids.device)}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        logits, target = self.logits(model, image_BKD, batch), target_of(batch)
        if self.loss == "ce":
            total = F.cross_entropy(logits, target, reduction="sum")
        else:
            one_hot = F.one_hot(target, len(LABELS)).to(logits.dtype)
            total = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum")
        return {"label": Loss(total, self.counts(batch)["label"])}


def measure(model: VLModel, objective: Entailment, made: ItemMaker, batch_size: int) -> dict[str, float]:
    """accuracy, and of each label accuracy/LABEL: how often a statement that has it is given it. accuracy/decided: of the
    statements that are not neutral, which words alone may tell (those of the embedded corpus do)."""
    right: list[bool] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches(made, batch_size, device):
            logits = objective.logits(model, encoded(model, batch), batch)
            right += logits.argmax(1).eq(target_of(batch)).tolist()
    labels = [str(item.told["label"]) for item in made.items]
    by_label = mean_by([float(r) for r in right], labels)
    decided = [r for r, label in zip(right, labels) if label != "neutral"]
    found = {"accuracy": sum(right) / len(right), "accuracy/decided": sum(decided) / max(1, len(decided))}
    return found | {f"accuracy/{label}": value for label, value in by_label.items()} | {"count": float(len(right))}


def evaluate(
    model: VLModel, objective: Entailment, data: EntailmentData, split: Split, tokenizer: Tokenizer
) -> dict[str, float]:
    """`measure` on a split; refuses one with an unreadable record."""
    return measure(model, objective, data.strict(split, tokenizer, model.config.image.size), data.batch_size)
