"""Is a statement true of an image? (NLVR, Suhr et al. 2017; the head is NLVR2's with one image, spec flm.md section 5)"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.pairs import Fit, Split
from fastvlp.data.records.schema import label_fault
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
class NLVRData(ItemData):
    """statements: the field of a record with its list of statements (`statements_zh`: the Chinese ones). Images are
    squashed, since a statement may be about what a crop would cut off."""

    statements: str = "statements"
    fit: Fit = "squash"

    def read(self, shards: Shards) -> list[Item]:
        return read_items(shards, self.statements, "text", "label", label_fault)

    def target(self, items: list[Item]) -> Tensor:
        """int64 [items]: 1 where the statement is true."""
        return torch.tensor([int(bool(item.told["label"])) for item in items], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class NLVRConfig(HeadConfig):
    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> NLVR:
        return NLVR(self, model)


class Truth(HeadTask):
    """Cross-entropy over false and true; what NLVR and NLVR2 share."""

    def __init__(self, config: HeadConfig, model: ModelConfig, *, images: int, head: nn.Module | None = None):
        super().__init__(config, model, images=images, outputs=2, head=head)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"label": torch.tensor(len(batch) // self.images, device=batch.ids.device)}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        logits = self.logits(model, image_BKD, batch)
        return {"label": Loss(F.cross_entropy(logits, target_of(batch), reduction="sum"), self.counts(batch)["label"])}


class NLVR(Truth):
    def __init__(self, config: NLVRConfig, model: ModelConfig):
        super().__init__(config, model, images=1)


def measure(model: VLModel, objective: Truth, made: ItemMaker, batch_size: int) -> dict[str, float]:
    """accuracy: share of statements judged right. consistency: share of different statements judged right
    beside every image they come with (Suhr et al. 2019, section 5)."""
    right: list[bool] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches(made, batch_size, device):
            logits = objective.logits(model, encoded(model, batch), batch)
            right += logits.argmax(1).eq(target_of(batch)).tolist()
    by_statement = mean_by([float(r) for r in right], [item.text for item in made.items])
    consistent = [share == 1.0 for share in by_statement.values()]
    return {
        "accuracy": sum(right) / len(right),
        "consistency": sum(consistent) / len(consistent),
        "count": float(len(right)),
    }


def evaluate(model: VLModel, objective: Truth, data: ItemData, split: Split, tokenizer: Tokenizer) -> dict[str, float]:
    """`measure` on a split; refuses one with an unreadable record."""
    return measure(model, objective, data.strict(split, tokenizer, model.config.image.size), data.batch_size)
