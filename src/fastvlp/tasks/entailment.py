"""Visual entailment: does an image entail a statement, contradict it, or neither? (SNLI-VE, Xie et al., arXiv
1901.06706; UNITER, arXiv 1909.11740, section 4)"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.pairs import Split
from fastvlp.data.records.schema import LABELS, entailment_fault
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Fit
from fastvlp.data.tokenize import Tokenizer
from fastvlp.eval.classification import mean_by
from fastvlp.eval.uncertainty import with_error
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.objective import Loss
from fastvlp.tasks.heads import HeadConfig, HeadObjective, image_states, target_of
from fastvlp.tasks.interface import FineTuned, Task
from fastvlp.tasks.item_data import ItemData
from fastvlp.tasks.items import Item, ItemMaker, batches_in_order, read_items


@dataclass(frozen=True, kw_only=True)
class EntailmentData(ItemData):
    """Statements with one of three labels."""

    entailments: str = "entailments"
    """Field of the records with the statements; entailments_zh has the Chinese ones."""
    fit: Fit = "squash"
    """How an image becomes a square."""

    def read(self, shards: Shards) -> list[Item]:
        return read_items(shards, self.entailments, "text", "label", entailment_fault)

    def target(self, items: list[Item]) -> Tensor:
        """Indices of the labels in LABELS: int64 [items]."""
        return torch.tensor([LABELS.index(item.entry["label"]) for item in items], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class EntailmentOptions:
    """Options of the objective that the task offers too."""

    loss: Literal["bce", "ce"] = "bce"
    """bce of each label by itself, summed (UNITER's released code), or ce over the three (its paper)."""


@dataclass(frozen=True, kw_only=True)
class EntailmentConfig(EntailmentOptions, HeadConfig):
    """A choice among three labels."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Entailment:
        return Entailment(self, model)


class Entailment(HeadObjective):
    """The loss of the labels."""

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


def measure(model: VLModel, objective: Entailment, items: ItemMaker, batch_size: int) -> dict[str, float]:
    """accuracy, and accuracy/LABEL of the statements with each label. accuracy/decided: of the statements that are not neutral.
    (Whether a statement is neutral may show in its words alone; in the embedded corpus it does.) chance: accuracy of always
    giving the most frequent label."""
    right: list[bool] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches_in_order(items, batch_size, device):
            logits = objective.logits(model, image_states(model, batch), batch)
            right += logits.argmax(1).eq(target_of(batch)).tolist()
    labels = [str(item.entry["label"]) for item in items.items]
    by_label = mean_by([float(r) for r in right], labels)
    decided = [r for r, label in zip(right, labels) if label != "neutral"]
    scores = with_error([float(r) for r in right], [item.record for item in items.items])
    scores |= {"chance": max(Counter(labels).values()) / len(labels)}
    scores |= {"accuracy/decided": sum(decided) / max(1, len(decided))}
    return scores | {f"accuracy/{label}": value for label, value in by_label.items()} | {"count": float(len(right))}


@dataclass(frozen=True, kw_only=True)
class EntailmentTask(EntailmentOptions, Task):
    """Decide whether an image entails a statement, contradicts it, or neither."""

    name = "entailment"
    data = EntailmentData
    config = EntailmentConfig
    field = "entailments"
    answer = "label"

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        return measure(tuned.saved.model, tuned.objective, tuned.items(split), tuned.data.batch_size)
