"""Pretraining: model + objectives -> named losses. The only thing that DDP and compile ever wrap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.model.image import random_keep
from fastvlp.model.model import VLModel
from fastvlp.objectives.ar import AR
from fastvlp.objectives.flm import FLM
from fastvlp.objectives.mlm import MLM
from fastvlp.objectives.objective import Loss, Objective
from fastvlp.objectives.prefixlm import PrefixLM


class Pretraining(nn.Module):
    def __init__(self, model: VLModel, objectives: Mapping[str, Objective], keep: float = 1.0):
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self.keep = keep

    def named(self) -> Iterable[tuple[str, Objective]]:
        """The objectives by name. Typed: to a module dict all are plain modules."""
        return cast(Mapping[str, Objective], self.objectives).items()

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """The image is encoded once and shared by all objectives; `keep` < 1 drops patches before any is embedded."""
        config = self.model.config.image
        keep = random_keep(batch.seed, config.grid**2, self.keep) if self.keep < 1 else None
        image_BKD = self.model.encode_image(batch.image, keep)
        return {
            f"{name}/{term}": loss
            for name, objective in self.named()
            for term, loss in objective(self.model, image_BKD, batch).items()
        }

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Targets of each loss, from the batch alone."""
        return {
            f"{name}/{term}": count
            for name, objective in self.named()
            for term, count in objective.counts(batch).items()
        }

    def uses_all(self) -> bool:
        """Whether every step surely gives each parameter a gradient: one stream reads all but the reconstructor, FLM all,
        unless its streams predict nothing. Separate heads and objectives with parameters of their own are never sure."""
        if self.model.forward_head is not None or next(self.objectives.parameters(), None) is not None:
            return False
        if self.model.reconstructor is None:
            return any(isinstance(o, AR | MLM | PrefixLM) for _, o in self.named())
        configs = [o.config for _, o in self.named() if isinstance(o, FLM)]
        return any(config.forward_weight or config.reverse_weight for config in configs)

    def after_step(self) -> None:
        for _, objective in self.named():
            objective.after_step(self.model)
