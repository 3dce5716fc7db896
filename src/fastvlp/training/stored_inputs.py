"""Whether a run reads stored states of its frozen encoders in place of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from fastvlp import dist
from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import Stored
from fastvlp.dist import Precision
from fastvlp.errors import UserError
from fastvlp.model.frozen_states import image_store
from fastvlp.objectives.objective import Objective
from fastvlp.training.pretraining import Pretraining

if TYPE_CHECKING:
    from fastvlp.training.state import TrainConfig


def stored_inputs(run: TrainConfig, pretraining: Pretraining) -> Stored | None:
    """Where the states are that the run reads, as its weights stand. None where it encodes at each step.

    Raises UserError where the run says that states are always stored, and they cannot be used.
    """
    reason = why_not_stored(run, pretraining)
    if reason is not None:
        if run.states.store == "always":
            raise UserError(f"`states.store` is always, and states cannot be stored: {reason}")
        return None
    embeds = all(objective.image_use == "embedding" for objective in objectives_of(pretraining).values())
    images = image_store(
        pretraining.model,
        run.states,
        precision=cast(Precision, run.precision),  # `start` has resolved `auto`
        use="embedding" if embeds else "states",
        reads=rows_read(run),
    )
    return Stored(images=images)


def objectives_of(pretraining: Pretraining) -> Mapping[str, Objective]:
    """Typed: to a module dict all are plain modules."""
    return cast(Mapping[str, Objective], pretraining.objectives)


def why_not_stored(run: TrainConfig, pretraining: Pretraining) -> str | None:
    """Why the images are encoded at each step; None where they need not be."""
    if run.states.store == "never":
        return "`states.store` is never"
    if "image" not in pretraining.model.encoders():
        return "the model has no image encoder"
    if not pretraining.model.is_frozen("image"):
        return "the image encoder is trained, as `freeze` does not name image"
    if run.keep < 1:
        return f"`keep` {run.keep} leaves out other patches each time"
    if run.augment != AugmentConfig():
        return "`augment` changes the images each time"
    for name, objective in objectives_of(pretraining).items():
        if objective.image_use == "pixels":
            return f"the objective {name} reads their pixels"
    return None


def rows_read(run: TrainConfig) -> float | None:
    """Rows that the run reads in all; None where nobody knows."""
    if run.steps is None or run.data.max_tokens is not None:
        return None
    return run.steps * run.accumulate * run.data.batch_size * dist.world()
