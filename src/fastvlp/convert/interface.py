"""What a layout of public checkpoints is: it reads the tensors of a file and says what model they are of."""

from __future__ import annotations

import abc
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fastvlp.convert.weight_map import Weights
from fastvlp.model.layers import Activation
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.objective import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Release:
    """A public checkpoint as a model of ours."""

    config: ModelConfig
    """Complete but for the vocabulary, which the tokenizer gives."""
    weights: dict[str, Tensor]
    """Every parameter of such a model but those in `untrained`."""
    data: dict[str, Any]
    """How it reads images and texts: fields of a run's `data` as config.json has them."""
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    """What it was pretrained with, by name."""
    objective_weights: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of these objectives that the file has, by `<name>.<parameter>`."""
    untrained: tuple[str, ...] = ()
    """Prefixes of parameters that the file lacks."""


class Layout(abc.ABC):
    """A family of public checkpoints whose files are laid out alike. A subclass is listed by `vlp convert`."""

    name: ClassVar[str]
    """What `vlp convert` calls it."""
    activations: ClassVar[Collection[Activation]] = ()
    """Activations that such models may have, where the file does not tell which."""
    completes_vocabulary: ClassVar[bool] = False
    """Whether the tokenizer lacks padding and a mask, which are then added, with new vectors."""

    @abc.abstractmethod
    def read(self, weights: Weights, activation: Activation | None = None) -> Release:
        """The model that `weights` are of: its size is read off the tensors. Raises UserError, KeyError or ValueError where
        they are laid out otherwise. `activation`: one of `activations`, or None where the user names none."""
