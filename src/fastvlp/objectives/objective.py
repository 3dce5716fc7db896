"""What an objective is: states to named losses, each a total and a count."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastvlp.batch import Batch, register_dataclass_node
from fastvlp.model.model import ModelConfig, Reading, VLModel

if TYPE_CHECKING:
    from fastvlp.data.tokenize import Tokenizer


@dataclass(frozen=True)
class Loss:
    """A sum over targets and how many there were. Only `combine` divides, once, by the count of the whole step."""

    total: Tensor
    count: Tensor
    weight: float = 1.0


register_dataclass_node(Loss)


def combine(losses: Mapping[str, Loss], counts: Mapping[str, Tensor] | None = None) -> Tensor:
    """Sum over terms of weight * total / count. `counts`: targets of the whole step, over micro-batches and ranks, so
    that neither accumulation nor ranks can change the objective; without it each loss's own count."""
    parts = [
        loss.weight * loss.total / (loss.count if counts is None else counts[name]).clamp(min=1)
        for name, loss in losses.items()
    ]
    return sum(parts[1:], start=parts[0])


class Objective(nn.Module, abc.ABC):
    """Owns only the parameters that nobody needs after pretraining. `reading`: how its model is best read later."""

    reading: Reading

    @abc.abstractmethod
    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """Named losses of one clean batch; whatever is drawn is a function of `batch.seed`."""

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The counts that `forward` will return, from the batch alone: known before any micro-batch is run."""

    def begin(self, model: VLModel) -> None:
        """Runs once, on fresh or inherited weights, before the first step. Most objectives have nothing to do."""

    def after_step(self, model: VLModel) -> None:
        """Runs once after each optimiser step: a momentum copy, a queue. Most objectives have nothing to do."""


class ObjectiveConfig(abc.ABC):
    """What a recipe says of an objective: a frozen dataclass that builds it."""

    @abc.abstractmethod
    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Objective:
        """`tokenizer` tells which ids are special and which start a word."""
