"""The interface of a layout of public checkpoints. It recognises a checkpoint, reads its tensors, and returns the config of
their model."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.layers import Activation
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.objective import ObjectiveConfig

# Special tokens that a model reads: padding too, where its layers see it.
Role = Literal["pad", "bos", "eos", "mask"]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A public checkpoint as a model of ours."""

    config: ModelConfig
    """Complete but for the vocabulary, which the tokenizer gives."""
    weights: Mapping[str, Tensor]
    """Every parameter of such a model but those in `untrained`."""
    data: Mapping[str, Any]
    """How it reads images and texts: fields of a run's `data` as config.json has them."""
    objectives: Mapping[str, ObjectiveConfig] = field(default_factory=dict)
    """The objectives that it was trained with, by name; for a fine-tuned model, its task comes first."""
    objective_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters of these objectives that the file has, by `<name>.<parameter>`."""
    untrained: tuple[str, ...] = ()
    """Prefixes of parameters that the file lacks."""
    needs: frozenset[Role] = frozenset({"pad", "bos", "eos", "mask"})
    """Special tokens that the tokenizer must have. Any other is added where it lacks one, with a new vector."""
    renew_words: Callable[[Tokenizer], Tokenizer] | None = None
    """Makes the tokenizer of what is released of it; None if it is the released one."""
    ends_in_largest: bool = False
    """Whether a text is summarised at its largest id, so that </s> must be the last word of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """Options of the user that describe a checkpoint if its files do not."""

    activation: Activation | None = None
    heads: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    task: str | None = None

    @property
    def given(self) -> set[str]:
        """Names of what is said."""
        return {name for name in ("activation", "heads", "answers", "task") if getattr(self, name)}


class Layout(abc.ABC):
    """A family of public checkpoints whose files are laid out alike. A subclass is found by `vlp convert`; one that neither
    a config nor names tell apart from others must be named there."""

    name: ClassVar[str]
    """Name of the layout in `vlp convert`."""
    summary: ClassVar[str]
    """Description of such files, for help and errors."""
    options: ClassVar[Collection[str]] = ()
    """Fields of `Stated` that it may need."""

    @classmethod
    def described(cls, source: Checkpoint) -> bool:
        """Whether the checkpoint's config says that it is of this layout. Here: no config does."""
        return False

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        """Whether the names of the checkpoint's tensors are those of this layout. Here: they say nothing."""
        return False

    @abc.abstractmethod
    def read(self, source: Checkpoint, stated: Stated) -> Release:
        """The model that a checkpoint is of.

        Raises UserError, KeyError, ValueError or IndexError if it is laid out otherwise, and UserError if neither the
        files nor the user say what is needed.
        """
