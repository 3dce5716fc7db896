"""Pretraining: a model and its objectives, which compute named losses of a batch. DDP wraps this module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.augment import AugmentConfig, augment
from fastvlp.errors import UserError
from fastvlp.model.keep import random_keep
from fastvlp.model.model import VLModel
from fastvlp.objectives.objective import Loss, Objective, PairObjective
from fastvlp.random import hash64

MIX_SALT, STATE_SALT = 701, 702


class RowGrads(NamedTuple):
    """Gradients of a step's loss with respect to one micro-batch's embeddings, and to what the objective itself learns."""

    rows: tuple[Tensor, ...]
    parameters: tuple[Tensor | None, ...]

    def as_loss(self, rows: tuple[Tensor, ...], objective: PairObjective) -> Loss:
        """Returns a loss of value 0 whose gradient is the cached one."""
        learned = [p for p in objective.parameters() if p.requires_grad]
        pairs = [*zip(rows, self.rows), *((p, g) for p, g in zip(learned, self.parameters) if g is not None)]
        total = torch.stack([(x * grad).sum() for x, grad in pairs]).sum()
        return Loss(total - total.detach(), total.new_ones(()))


class Embedded(NamedTuple):
    """The tensors that an objective scores: its embeddings, which get gradients, and further tensors, which do not."""

    rows: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]


def draw_objective(mix: Mapping[str, float] | None, seed: int, step: int) -> str | None:
    """Draws the objective that a step runs, with its share of the mix as probability, the same on every rank. Returns None
    without a mix: then all objectives run."""
    if mix is None:
        return None
    point = hash64(seed, step, MIX_SALT) / 2**63 * sum(mix.values())
    return next(name for name, upper in zip(mix, accumulate(mix.values())) if point < upper)


def augmented(batch: Batch, config: AugmentConfig) -> Batch:
    """Returns a batch with its images changed at random, by the rows' seeds, and its boxes moved accordingly. Stored states of
    images are not changed: they were chosen by the same seeds."""
    if config == AugmentConfig() or batch.image.ndim == 3:
        return batch
    regions = batch.regions
    image, box_BR4 = augment(batch.image, batch.seed, config, None if regions is None else regions.box)
    if regions is not None and box_BR4 is not None:
        regions = replace(regions, box=box_BR4)
    return replace(batch, image=image, regions=regions, plain=batch.image)


class Pretraining(nn.Module):
    """The model and its objectives.

    Attributes:
        keep: share of an image's patches that are encoded in training.
        keep_states: share of an image's states that an objective which predicts words reads in training.
        masked_validation: whether validation uses these shares too.
        active: the objective that training runs alone, until another is chosen; None runs all.
    """

    def __init__(
        self,
        model: VLModel,
        objectives: Mapping[str, Objective],
        keep: float = 1.0,
        *,
        keep_states: float = 1.0,
        masked_validation: bool = False,
    ):
        super().__init__()
        self.masked_validation = masked_validation
        for objective in objectives.values():
            objective.masked_validation = masked_validation
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self.keep, self.keep_states = keep, keep_states
        self.active: str | None = None
        self._checked: set[str] = set()  # objectives whose losses were found to have the names of their counts

    def all_objectives(self) -> Mapping[str, Objective]:
        """Returns all objectives by name, with their type, which a module dict does not know."""
        return cast(Mapping[str, Objective], self.objectives)

    def active_objectives(self) -> Mapping[str, Objective]:
        """Returns the objectives that run, by name; validation runs all."""
        if self.active is None or not self.training:
            return self.all_objectives()
        return {self.active: self.all_objectives()[self.active]}

    def pair_objectives(self) -> dict[str, PairObjective]:
        """Returns the active objectives whose loss depends on several rows together."""
        return {name: part for name, part in self.active_objectives().items() if isinstance(part, PairObjective)}

    @property
    def contrasts(self) -> bool:
        """Whether any objective uses the texts of other rows as negatives for the image of a row."""
        return any(objective.contrasts for objective in self.all_objectives().values())

    def encode_image(self, batch: Batch) -> Tensor:
        """Returns the states of the images [B K D]. If `keep` is below 1, training drops patches before they are embedded,
        always the same ones for the same row seed."""
        share = self.keep if self.training or self.masked_validation else 1.0
        keep = self.model.config.image.random_patches(batch.seed, share, batch.image)
        return self.model.encode_image(batch.image, keep, batch.regions)

    def states_for(self, objective: Objective, image_BKD: Tensor, batch: Batch) -> Tensor:
        """Returns the states of the images that an objective reads. An objective that predicts words may get a random share of
        the states of the map, after the whole image was encoded (OpenVision 2, arXiv 2509.01644, section 3)."""
        masked = self.training or self.masked_validation
        if self.keep_states == 1 or not masked or objective.cloze_method is None:
            return image_BKD
        first = self.model.config.image.prefix
        keep_BK = random_keep(batch.seed, image_BKD.shape[1] - first, self.keep_states, STATE_SALT) + first
        kept = image_BKD.gather(1, keep_BK[..., None].expand(-1, -1, image_BKD.shape[-1]))
        return torch.cat([image_BKD[:, :first], kept], 1)

    def forward(self, batch: Batch, cached: Mapping[str, RowGrads] | None = None) -> dict[str, Loss]:
        """Returns named losses of a batch. The images are encoded once for all objectives.

        `cached`: gradients of the embeddings, for objectives that were already scored on the whole step
        (`training/gradient_cache.py`).
        """
        cached = cached or {}
        image_BKD = self.encode_image(batch)
        losses: dict[str, Loss] = {}
        # Pair objectives come first, as in the pass that only embeds. So the second pass draws the same dropout.
        ordered = sorted(self.active_objectives().items(), key=lambda item: not isinstance(item[1], PairObjective))
        for name, objective in ordered:
            if isinstance(objective, PairObjective) and name in cached:
                losses[f"{name}/cached"] = cached[name].as_loss(
                    objective.embed(self.model, image_BKD, batch), objective
                )
                continue
            states = self.states_for(objective, image_BKD, batch)
            losses |= {f"{name}/{term}": loss for term, loss in objective(self.model, states, batch).items()}
        return losses

    def embedded(self, batch: Batch, around: Callable[[str], AbstractContextManager[None]]) -> dict[str, Embedded]:
        """Returns, by name, the tensors of one batch that the contrastive objectives score. `around(name)`: the context in
        which the constants of one are computed."""
        image_BKD = self.encode_image(batch)
        pairs = self.pair_objectives()
        rows = {name: part.embed(self.model, image_BKD, batch) for name, part in pairs.items()}
        constants = {}
        for name, part in pairs.items():
            with around(name):
                constants[name] = part.constants(self.model, batch)
        return {name: Embedded(rows[name], constants[name]) for name in pairs}

    def validation(self, batch: Batch) -> tuple[dict[str, Loss], dict[str, tuple[Tensor, ...]]]:
        """Returns the losses of the objectives that need no other batch. For pair objectives, returns the tensors that their
        `score` takes; the caller collects these from several batches and then scores them."""
        image_BKD = self.encode_image(batch)
        losses: dict[str, Loss] = {}
        pairs = self.pair_objectives()
        rows = {
            name: (*part.embed(self.model, image_BKD, batch), *part.constants(self.model, batch))
            for name, part in pairs.items()
        }
        for name, objective in self.active_objectives().items():
            if name not in pairs and not (objective.contrasts and len(batch) == 1):
                states = self.states_for(objective, image_BKD, batch)
                losses |= {f"{name}/{term}": loss for term, loss in objective(self.model, states, batch).items()}
        return losses, rows

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts the targets of each loss, from the batch alone."""
        return {
            f"{name}/{term}": count
            for name, objective in self.active_objectives().items()
            for term, count in objective.counts(batch).items()
        }

    def check_names(self, losses: Collection[str], counts: Collection[str]) -> None:
        """Raises UserError if the losses of an active objective have other names than its counts, by which they are divided.
        Checks each objective once."""
        for name in [name for name in self.active_objectives() if name not in self._checked]:
            cached = f"{name}/cached"  # stands for the losses of all micro-batches together, which have no such name
            returned, counted = (
                sorted(key.removeprefix(f"{name}/") for key in keys if key.startswith(f"{name}/") and key != cached)
                for keys in (losses, counts)
            )
            if returned != counted:
                raise UserError(
                    f"objective {name}: `counts` of its {type(self.objectives[name]).__name__} has the names {counted}, but "
                    f"its losses are named {returned}; give them the same names, because each loss is divided by its count"
                )
            self._checked.add(name)

    def uses_all(self) -> bool:
        """Whether it is certain that every step gives each parameter a gradient. This is not known for models with separate
        heads, a joint space or a single stream, and for objectives with parameters of their own."""
        config, own = self.model.config, next(self.objectives.parameters(), None)
        if config.separate_heads or config.embed or config.single or own is not None:
            return False
        return any(objective.reaches_all(config) for objective in self.active_objectives().values())

    def after_step(self) -> None:
        """Runs `after_step` of the active objectives."""
        for objective in self.active_objectives().values():
            objective.after_step(self.model)
