"""Pretraining: model + objectives -> named losses. The only thing that DDP and compile ever wrap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.augment import AugmentConfig, augment
from fastvlp.model.model import VLModel
from fastvlp.objectives.objective import Loss, Objective, PairObjective
from fastvlp.random import hash64

MIX_SALT = 701


class RowGrads(NamedTuple):
    """Gradients of a step's loss with respect to one micro-batch's embeddings, and to what the objective itself learns."""

    rows: tuple[Tensor, ...]
    parameters: tuple[Tensor | None, ...]

    def pulling(self, rows: tuple[Tensor, ...], objective: PairObjective) -> Loss:
        """A loss of value 0 whose gradient is the one that was cached."""
        learned = [p for p in objective.parameters() if p.requires_grad]
        pairs = [*zip(rows, self.rows), *((p, g) for p, g in zip(learned, self.parameters) if g is not None)]
        total = torch.stack([(x * grad).sum() for x, grad in pairs]).sum()
        return Loss(total - total.detach(), total.new_ones(()))


def draw_task(mix: Mapping[str, float] | None, seed: int, step: int) -> str | None:
    """The objective that a step runs, drawn by its share of the mix, the same on every rank; None: all of them."""
    if mix is None:
        return None
    point = hash64(seed, step, MIX_SALT) / 2**63 * sum(mix.values())
    return next(name for name, upper in zip(mix, accumulate(mix.values())) if point < upper)


def augmented(batch: Batch, config: AugmentConfig) -> Batch:
    """What training shows of a batch: other looks at its images, drawn by the rows' seeds; boxes move along."""
    if config == AugmentConfig():
        return batch
    regions = batch.regions
    image, box_BR4 = augment(batch.image, batch.seed, config, None if regions is None else regions.box)
    if regions is not None and box_BR4 is not None:
        regions = replace(regions, box=box_BR4)
    return replace(batch, image=image, regions=regions, plain=batch.image)


class Pretraining(nn.Module):
    """`task`: the objective that training runs alone until the next one is chosen; None: all of them."""

    def __init__(self, model: VLModel, objectives: Mapping[str, Objective], keep: float = 1.0):
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self.keep = keep
        self.task: str | None = None

    def named(self) -> Iterable[tuple[str, Objective]]:
        """The objectives to run by name: validation runs all. Typed: to a module dict all are plain modules."""
        everyone = cast(Mapping[str, Objective], self.objectives)
        if self.task is None or not self.training:
            return everyone.items()
        return [(self.task, everyone[self.task])]

    def pairs(self) -> dict[str, PairObjective]:
        return {name: objective for name, objective in self.named() if isinstance(objective, PairObjective)}

    def encode_image(self, batch: Batch) -> Tensor:
        """-> [B K D]; `keep` < 1 drops patches before any is embedded, the same ones for the same row seeds."""
        keep = self.model.config.image.random_patches(batch.seed, self.keep)
        return self.model.encode_image(batch.image, keep, batch.regions)

    def forward(self, batch: Batch, cached: Mapping[str, RowGrads] | None = None) -> dict[str, Loss]:
        """The image is encoded once and shared by all objectives. `cached`: of objectives that were scored on the whole
        step already, the gradients of their embeddings (`train/cached.py`)."""
        cached = cached or {}
        image_BKD = self.encode_image(batch)
        losses: dict[str, Loss] = {}
        # Those that couple rows come first, as when they embed alone: a second pass then draws the same dropout.
        for name, objective in sorted(self.named(), key=lambda item: not isinstance(item[1], PairObjective)):
            if isinstance(objective, PairObjective) and name in cached:
                losses[f"{name}/cached"] = cached[name].pulling(
                    objective.embed(self.model, image_BKD, batch), objective
                )
                continue
            losses |= {f"{name}/{term}": loss for term, loss in objective(self.model, image_BKD, batch).items()}
        return losses

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Targets of each loss, from the batch alone."""
        return {
            f"{name}/{term}": count
            for name, objective in self.named()
            for term, count in objective.counts(batch).items()
        }

    def uses_all(self) -> bool:
        """Whether every step surely gives each parameter a gradient. Separate heads, a joint space and objectives with
        parameters of their own are never sure."""
        config, own = self.model.config, next(self.objectives.parameters(), None)
        if config.separate_heads or config.embed or config.single or own is not None:
            return False
        return any(objective.reaches_all(config) for _, objective in self.named())

    def after_step(self) -> None:
        """Of the objectives that the step ran."""
        for _, objective in self.named():
            objective.after_step(self.model)
