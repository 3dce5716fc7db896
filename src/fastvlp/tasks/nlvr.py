"""Is a statement true of an image? (NLVR, Suhr et al., ACL 2017.) The head is that of NLVR2, with one image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.pairs import Split
from fastvlp.data.records.schema import label_fault
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
class NLVRData(ItemData):
    """Statements that are true or false. Images are squashed, since a statement may be about what a crop would cut off."""

    statements: str = "statements"
    """Field of the records with the statements; statements_zh has the Chinese ones."""
    fit: Fit = "squash"
    """How an image becomes a square."""

    def read(self, shards: Shards) -> list[Item]:
        return read_items(shards, self.statements, "text", "label", label_fault)

    def target(self, items: list[Item]) -> Tensor:
        """1 where the statement is true: int64 [items]."""
        return torch.tensor([int(bool(item.entry["label"])) for item in items], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class NLVRConfig(HeadConfig):
    """A statement about one image, true or false."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> NLVR:
        return NLVR(self, model)


class Truth(HeadObjective):
    """Cross-entropy over false and true, for NLVR and NLVR2."""

    def __init__(self, config: HeadConfig, model: ModelConfig, *, images: int, head: nn.Module | None = None):
        super().__init__(config, model, images=images, outputs=2, head=head)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"label": torch.tensor(len(batch) // self.images, device=batch.ids.device)}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        logits = self.logits(model, image_BKD, batch)
        return {"label": Loss(F.cross_entropy(logits, target_of(batch), reduction="sum"), self.counts(batch)["label"])}


class NLVR(Truth):
    """The loss of statements about one image."""

    def __init__(self, config: NLVRConfig, model: ModelConfig):
        super().__init__(config, model, images=1)


def measure(model: VLModel, objective: Truth, items: ItemMaker, batch_size: int) -> dict[str, float]:
    """accuracy: share of statements that are classified right. consistency: share of different statements that are classified
    right beside every image they come with (Suhr et al. 2019, arXiv 1811.00491, section 5). chance: accuracy of always giving
    the more frequent label."""
    right: list[bool] = []
    labels: list[int] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches_in_order(items, batch_size, device):
            logits = objective.logits(model, image_states(model, batch), batch)
            right += logits.argmax(1).eq(target_of(batch)).tolist()
            labels += target_of(batch).tolist()
    by_statement = mean_by([float(r) for r in right], [item.text for item in items.items])
    consistent = [share == 1.0 for share in by_statement.values()]
    return with_error([float(r) for r in right], [item.record for item in items.items]) | {
        "chance": max(Counter(labels).values()) / len(labels),
        "consistency": sum(consistent) / len(consistent),
        "count": float(len(right)),
    }


@dataclass(frozen=True, kw_only=True)
class NLVRTask(Task):
    """Decide whether a statement about an image is true."""

    name = "nlvr"
    data = NLVRData
    config = NLVRConfig
    field = "statements"
    answer = "label"

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        return measure(tuned.saved.model, tuned.objective, tuned.items(split), tuned.data.batch_size)
