"""Grounding: find the region that an expression refers to (RefCOCO, RefCOCO+, RefCOCOg; UNITER, arXiv 1909.11740, section 4;
released code: model/re.py)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.pairs import Split
from fastvlp.data.records.schema import list_fault
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Fit
from fastvlp.data.tokenize import Tokenizer
from fastvlp.eval.uncertainty import with_error
from fastvlp.model.freezing import evaluating
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import box_vector, require_regions
from fastvlp.model.region_pooling import RegionPool, RegionPooling
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import Loss, Objective
from fastvlp.random import uniform
from fastvlp.tasks.heads import HeadConfig, check_reading, image_states, target_of
from fastvlp.tasks.interface import FineTuned, Task
from fastvlp.tasks.item_data import ItemData
from fastvlp.tasks.items import Item, ItemMaker, batches_in_order, read_items
from fastvlp.tasks.uniter_heads import rank_loss, region_head, region_scores

COIN_SALT, OTHER_SALT = 721, 722
# A region that overlaps the right box by more than this share of their union is right.
RIGHT_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True)
class GroundingData(ItemData):
    """Expressions that refer to an object. The answer is its box, so that regions need not be the record's objects: those of
    a detector are scored by how much they overlap it."""

    expressions: str = "expressions"
    """Field of the records with the expressions; expressions_zh has the Chinese ones."""
    fit: Fit = "squash"
    """How an image becomes a square."""

    def read(self, shards: Shards) -> list[Item]:
        return [_with_box(shards, item) for item in read_items(shards, self.expressions, "text", "object")]

    def target(self, items: list[Item]) -> Tensor:
        """The right boxes, as in `Regions`: float [items 4]."""
        return torch.tensor([item.box for item in items]).reshape(-1, 4)


def _with_box(shards: Shards, item: Item) -> Item:
    """The item with the box of its object; without a text where there is no such object."""
    if not item.text:
        return item
    info, place = shards.info(item.record), item.entry["object"]
    if wrong := list_fault(info, "objects"):
        return Item(item.record, "", {}, wrong)
    objects = info.get("objects", [])
    if not isinstance(place, int) or not 0 <= place < len(objects):
        return Item(item.record, "", {}, f"an expression refers to object {place!r} of {len(objects)}")
    return item._replace(box=tuple(objects[place]["box"]))


@dataclass(frozen=True, kw_only=True)
class GroundingOptions:
    """Options of the objective that the task offers too."""

    loss: Literal["ce", "rank"] = "ce"
    """ce: cross-entropy over the regions. rank: a hinge that puts the right region above one other."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether the losses of a batch are averaged or summed; UNITER's released code sums."""
    layers: Literal[1, 2] = 1
    """Layers of the head that scores a region; UNITER has 2 for RefCOCO+."""


@dataclass(frozen=True, kw_only=True)
class GroundingConfig(GroundingOptions, HeadConfig):
    """A choice among the regions of an image."""

    margin: float = 0.2
    """rank: how far the sigmoids of the two scores shall differ."""
    hard: float = 0.3
    """rank: probability that the other region is the best-scored wrong one; else it is drawn from all."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Grounding:
        return Grounding(self, model)


def overlap(box: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes x0 y0 x1 y1 [... 4] -> [...]; 0 where neither has an area. The edges are lines between
    pixels. (The released code's boxes include their last row and column.)"""
    size = (torch.minimum(box[..., 2:], other[..., 2:]) - torch.maximum(box[..., :2], other[..., :2])).clamp(min=0)
    both = size.prod(-1)
    either = sum((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (box, other)) - both
    return both / either.clamp(min=1e-9)


class RegionsBeside(nn.Module):
    """The state of a region in a fusion model: the states of its patches and its box, gated by the summary of the text beside
    the image. This is our own: the papers of fusion models have no regions."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        width = model.text.width
        self.content = RegionPooling(RegionPool(place="exact"), model.image, width)
        self.place = nn.Linear(7, width)
        self.norm = nn.LayerNorm(width, eps=model.text.norm_eps)
        self.pool = nn.Linear(width, width)

    def forward(self, summary_BD: Tensor, image_BKD: Tensor, batch: Batch) -> Tensor:
        """-> states of the regions [B R D]."""
        regions = require_regions(batch.regions)
        content = self.content(image_BKD, regions)[0] + self.place(box_vector(regions.box.to(image_BKD.dtype)))
        return F.gelu(self.norm(content)) * torch.tanh(self.pool(summary_BD))[:, None]


class Grounding(Objective):
    """The loss of the regions' scores."""

    def __init__(self, config: GroundingConfig, model: ModelConfig):
        super().__init__()
        check_reading(config.reading, model)
        width = model.text.width
        self.config, self.reading, self.bos = config, config.reading, config.bos
        self.beside = RegionsBeside(model) if model.single is None else None
        self.head = region_head(width, config.layers)
        initialise(self, width)

    def scores(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        """Scores how well each region matches the expression -> [B R]; padding has -1e4."""
        regions = require_regions(batch.regions)
        if self.beside is None:
            state_BRD = model.read_regions(image_BKD, regions, batch.ids, batch.length).region
        else:
            reading, bos = self.config.reading, self.config.bos
            summary = model.summarise(image_BKD, batch.ids, batch.length, reading=reading, bos=bos)
            state_BRD = self.beside(summary, image_BKD, batch)
        return at_least_fp32(region_scores(self.head, state_BRD, regions.mask))

    def right(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The right region of each row [B], and whether there is one to learn from, bool [B]."""
        regions = require_regions(batch.regions)
        best = overlap(regions.box, target_of(batch)[:, None]).masked_fill(~regions.mask, -1).max(1)
        others = regions.mask.sum(1) > 1
        return best.indices, (best.values > RIGHT_OVERLAP) & (others if self.config.loss == "rank" else True)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        learnable = self.right(batch)[1].sum()
        return {"region": learnable.clamp(max=1) if self.config.reduction == "sum" else learnable}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        scores_BR, (right, learnable) = self.scores(model, image_BKD, batch), self.right(batch)
        if self.config.loss == "ce":
            each_B = F.cross_entropy(scores_BR, right, reduction="none")
        else:
            pair_B2 = scores_BR.gather(1, torch.stack([right, self.wrong(scores_BR.detach(), right, batch)], 1))
            each_B = rank_loss(pair_B2, self.config.margin)[:, 0]
        return {"region": Loss(torch.where(learnable, each_B, 0).sum(), self.counts(batch)["region"])}

    def wrong(self, scores_BR: Tensor, right_B: Tensor, batch: Batch) -> Tensor:
        """A wrong region of each row [B]: drawn from all, or the best-scored one."""
        regions = require_regions(batch.regions)
        out = ~regions.mask | F.one_hot(right_B, scores_BR.shape[1]).bool()
        drawn = uniform(batch.seed, (scores_BR.shape[1],), OTHER_SALT).masked_fill(out, -1).argmax(1)
        hard = uniform(batch.seed, (1,), COIN_SALT)[:, 0] < self.config.hard
        return torch.where(hard, scores_BR.masked_fill(out, -torch.inf).argmax(1), drawn)


def measure(model: VLModel, objective: Grounding, items: ItemMaker, batch_size: int) -> dict[str, float]:
    """accuracy: share of expressions whose best-scored region overlaps the right box by more than half of their union.
    reachable: share of expressions that have such a region. chance: accuracy of a region drawn at random."""
    hits: list[Tensor] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches_in_order(items, batch_size, device):
            scores, regions = objective.scores(model, image_states(model, batch), batch), require_regions(batch.regions)
            fits = (overlap(regions.box, target_of(batch)[:, None]) > RIGHT_OVERLAP) & regions.mask
            chosen = fits.gather(1, scores.argmax(1, keepdim=True))[:, 0]
            hits.append(torch.stack([chosen, fits.any(1), fits.sum(1) / regions.mask.sum(1)]).cpu())
    hit, possible, random = torch.cat(hits, 1).double()
    return with_error(hit.tolist(), [item.record for item in items.items]) | {
        "reachable": float(possible.mean()),
        "chance": float(random.mean()),
        "count": float(len(items.items)),
    }


@dataclass(frozen=True, kw_only=True)
class GroundingTask(GroundingOptions, Task):
    """Find the region that an expression refers to."""

    name = "grounding"
    data = GroundingData
    config = GroundingConfig
    field = "expressions"
    answer = "object"
    needs_regions = True

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        return measure(tuned.saved.model, tuned.objective, tuned.items(split), tuned.data.batch_size)
