"""Which region does an expression mean? (referring expressions: RefCOCO, RefCOCO+, RefCOCOg; UNITER, arXiv 1909.11740,
section 4; released code: model/re.py)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.pairs import Fit, Split
from fastvlp.data.records.schema import list_fault
from fastvlp.data.records.shards import Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.eval.mode import evaluating
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import box_vector, given
from fastvlp.model.region_pooling import RegionPool, RegionPooling
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import Loss, Objective
from fastvlp.random import uniform
from fastvlp.tasks.task import (
    HeadConfig,
    Item,
    ItemData,
    ItemMaker,
    batches,
    check_reads,
    encoded,
    read_items,
    target_of,
)
from fastvlp.tasks.uniter_heads import rank_loss, region_head, region_scores

COIN_SALT, OTHER_SALT = 721, 722
# A box that overlaps by more than this is the one that was meant.
ENOUGH = 0.5


@dataclass(frozen=True, kw_only=True)
class GroundingData(ItemData):
    """expressions: the field of a record with its list of expressions (`expressions_zh`: the Chinese ones). What is meant is
    a box, so that regions need not be the record's objects: a detector's are scored by how much they overlap."""

    expressions: str = "expressions"
    fit: Fit = "squash"

    def read(self, shards: Shards) -> list[Item]:
        return [_meant(shards, item) for item in read_items(shards, self.expressions, "text", "object")]

    def target(self, items: list[Item]) -> Tensor:
        """float [items 4]: the box that is meant, as `Regions` has them."""
        return torch.tensor([item.box for item in items]).reshape(-1, 4)


def _meant(shards: Shards, item: Item) -> Item:
    if not item.text:
        return item
    info, place = shards.info(item.record), item.told["object"]
    if wrong := list_fault(info, "objects"):
        return Item(item.record, "", {}, wrong)
    objects = info.get("objects", [])
    if not isinstance(place, int) or not 0 <= place < len(objects):
        return Item(item.record, "", {}, f"an expression means object {place!r}, and there are {len(objects)} objects")
    return item._replace(box=tuple(objects[place]["box"]))


@dataclass(frozen=True, kw_only=True)
class GroundingConfig(HeadConfig):
    """loss: cross-entropy over the regions, or `rank`: the right region above another by a margin (of the scores' sigmoids),
    which with probability `hard` is the best of the others. reduction: `sum` over the batch, as the released code has it.
    layers: of the head, 2 for RefCOCO+."""

    loss: Literal["ce", "rank"] = "ce"
    reduction: Literal["mean", "sum"] = "mean"
    layers: Literal[1, 2] = 1
    margin: float = 0.2
    hard: float = 0.3

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Grounding:
        return Grounding(self, model)


def overlap(box: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes x0 y0 x1 y1 [... 4] -> [...]; 0 where neither has an area. The edges are lines
    between pixels: where boxes name their last pixels, as in the released code, a row and a column more would count."""
    size = (torch.minimum(box[..., 2:], other[..., 2:]) - torch.maximum(box[..., :2], other[..., :2])).clamp(min=0)
    both = size.prod(-1)
    either = sum((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (box, other)) - both
    return both / either.clamp(min=1e-9)


class RegionsBeside(nn.Module):
    """What a fusion model knows of a region: the states of its patches and its box, each feature of which the summary of
    the text beside the image lets through or not. Ours: fusion models have no regions in their papers."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        width = model.text.width
        self.content = RegionPooling(RegionPool(place="exact"), model.image, width)
        self.place = nn.Linear(7, width)
        self.norm = nn.LayerNorm(width, eps=model.text.norm_eps)
        self.pool = nn.Linear(width, width)

    def forward(self, summary_BD: Tensor, image_BKD: Tensor, batch: Batch) -> Tensor:
        """[B R D]"""
        regions = given(batch.regions)
        content = self.content(image_BKD, regions)[0] + self.place(box_vector(regions.box.to(image_BKD.dtype)))
        return F.gelu(self.norm(content)) * torch.tanh(self.pool(summary_BD))[:, None]


class Grounding(Objective):
    def __init__(self, config: GroundingConfig, model: ModelConfig):
        super().__init__()
        check_reads(config.reading, model)
        width = model.text.width
        self.config, self.reading = config, config.reading
        self.beside = RegionsBeside(model) if model.single is None else None
        self.head = region_head(width, config.layers)
        initialise(self, width)

    def scores(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        """How well each region fits, [B R]; padding -1e4."""
        regions = given(batch.regions)
        if self.beside is None:
            state_BRD = model.read_regions(image_BKD, regions, batch.ids, batch.length).region
        else:
            reading, bos = self.config.reading, self.config.bos
            summary = model.summarise(image_BKD, batch.ids, batch.length, reading=reading, bos=bos)
            state_BRD = self.beside(summary, image_BKD, batch)
        return at_least_fp32(region_scores(self.head, state_BRD, regions.mask))

    def right(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each row the region that is meant, [B], and whether there is one to learn, bool [B]."""
        regions = given(batch.regions)
        best = overlap(regions.box, target_of(batch)[:, None]).masked_fill(~regions.mask, -1).max(1)
        others = regions.mask.sum(1) > 1
        return best.indices, (best.values > ENOUGH) & (others if self.config.loss == "rank" else True)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        known = self.right(batch)[1].sum()
        return {"region": known.clamp(max=1) if self.config.reduction == "sum" else known}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        scores_BR, (right, known) = self.scores(model, image_BKD, batch), self.right(batch)
        if self.config.loss == "ce":
            each_B = F.cross_entropy(scores_BR, right, reduction="none")
        else:
            pair_B2 = scores_BR.gather(1, torch.stack([right, self.wrong(scores_BR.detach(), right, batch)], 1))
            each_B = rank_loss(pair_B2, self.config.margin)[:, 0]
        return {"region": Loss(torch.where(known, each_B, 0).sum(), self.counts(batch)["region"])}

    def wrong(self, scores_BR: Tensor, right_B: Tensor, batch: Batch) -> Tensor:
        """Another region of each row, [B]: drawn from all, or the best."""
        regions = given(batch.regions)
        out = ~regions.mask | F.one_hot(right_B, scores_BR.shape[1]).bool()
        drawn = uniform(batch.seed, (scores_BR.shape[1],), OTHER_SALT).masked_fill(out, -1).argmax(1)
        hard = uniform(batch.seed, (1,), COIN_SALT)[:, 0] < self.config.hard
        return torch.where(hard, scores_BR.masked_fill(out, -torch.inf).argmax(1), drawn)


def measure(model: VLModel, objective: Grounding, made: ItemMaker, batch_size: int) -> dict[str, float]:
    """accuracy: share of expressions whose best-scored region overlaps what is meant by more than half of their union.
    reachable: share for which there is such a region. chance: of a region drawn at random."""
    found: list[Tensor] = []
    device = next(model.parameters()).device
    with evaluating(model, objective):
        for batch in batches(made, batch_size, device):
            scores, regions = objective.scores(model, encoded(model, batch), batch), given(batch.regions)
            fits = (overlap(regions.box, target_of(batch)[:, None]) > ENOUGH) & regions.mask
            chosen = fits.gather(1, scores.argmax(1, keepdim=True))[:, 0]
            found.append(torch.stack([chosen, fits.any(1), fits.sum(1) / regions.mask.sum(1)]).cpu())
    accuracy, reachable, chance = torch.cat(found, 1).double().mean(1).tolist()
    return {"accuracy": accuracy, "reachable": reachable, "chance": chance, "count": float(len(made.items))}


def evaluate(
    model: VLModel, objective: Grounding, data: GroundingData, split: Split, tokenizer: Tokenizer
) -> dict[str, float]:
    """`measure` on a split; refuses one with an unreadable record."""
    return measure(model, objective, data.strict(split, tokenizer, model.config.image.size), data.batch_size)
