"""The interface of an objective: losses of a batch, each a total and a count, and what a model trained by it can do."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from fastvlp import dist
from fastvlp.batch import Batch, register_dataclass_node
from fastvlp.errors import UserError
from fastvlp.model.frozen_states import ImageUse, TextUse
from fastvlp.model.model import Bos, ModelConfig, Reading, VLModel

if TYPE_CHECKING:
    from fastvlp.data.tokenize import Tokenizer

# What a model can do. embed: unit vectors of images and texts that can be compared. write: a text left to right, beside an
# image. match: a score of how well a text fits an image, and answer: a choice of answers, both by the objective's own head.
Ability = Literal["embed", "write", "match", "answer"]
HEAD_ABILITIES: frozenset[Ability] = frozenset({"match", "answer"})
# Image states [B K D] and a clean batch -> a prediction of each token, int64 [B L]; no token is read to predict itself.
ClozeMethod = Callable[[VLModel, Tensor, Batch], Tensor]
# Image states [B K D], or [1 K D] of one image for all, ids [B L] and lengths [B] of texts -> how well each fits, [B].
PairScorer = Callable[[VLModel, Tensor, Tensor, Tensor], Tensor]

MORE_ROWS = "raise --data.batch-size, or --data.max-tokens where it is given: then that alone sizes the batches"


@dataclass(frozen=True)
class Loss:
    """A sum over targets and how many there were. Only `combine` divides, once, by the count of the whole step."""

    total: Tensor
    count: Tensor
    weight: float = 1.0


register_dataclass_node(Loss)


def combine(losses: Mapping[str, Loss], counts: Mapping[str, Tensor] | None = None) -> Tensor:
    """Sum over terms of weight * total / count. `counts`: targets of the whole step, over micro-batches and ranks, so
    that neither accumulation nor ranks can change the objective; a loss that is not in it has its own count."""
    counts = counts or {}
    parts = [loss.weight * loss.total / counts.get(name, loss.count).clamp(min=1) for name, loss in losses.items()]
    return sum(parts[1:], start=parts[0])


class Objective(nn.Module, abc.ABC):
    """Owns only the parameters that nobody needs after pretraining, but for the head of an ability.

    Attributes:
        reading: how the model best reads a text for a task later.
        bos: what `<s>` sees where the objective reads left to right; None where it does not read so.
        reads_mask: whether it reads the token that stands for a hidden word.
        abilities: what a model trained by it can do. They are saved with the weights.
        image_use: the least that it reads of a batch's images: their vectors in the joint space (`embed_image`), the states
            that it gets, or their pixels. States of a frozen encoder are stored, pixels are decoded at each step.
        text_use: the least that it reads of the texts: their vectors in the joint space (`embed_text`), or their words.
    """

    reading: Reading = "full"
    bos: Bos | None = None
    reads_mask: bool = False
    abilities: frozenset[Ability] = frozenset()
    image_use: ImageUse = "states"
    text_use: TextUse = "words"

    @abc.abstractmethod
    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """Named losses of one clean batch; whatever is drawn is a function of `batch.seed`."""

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The counts that `forward` will return, from the batch alone: known before any micro-batch is run."""

    def check(self, samples: Iterator[Batch]) -> None:
        """Runs once, when a run starts; `samples` are single rows from all over its data, read as they are asked for.
        Raises UserError where the data lacks what is learned from. Most objectives leave that to the first batch."""

    def begin(self, model: VLModel) -> None:
        """Runs once, on fresh or inherited weights, before the first step. Most objectives have nothing to do."""

    def after_step(self, model: VLModel) -> None:
        """Runs once after each optimiser step: a momentum copy, a queue. Most objectives have nothing to do."""

    def kept(self) -> dict[str, Tensor]:
        """What of its state is worth keeping with the weights: all, but for what training alone reads."""
        return self.state_dict()

    def reaches_all(self, model: ModelConfig) -> bool:
        """Whether each step surely gives every parameter of the towers, the fusion, its head and the reconstructor a
        gradient. Under DDP no parameter is then searched for that got none."""
        return False

    @property
    def cloze_method(self) -> ClozeMethod | None:
        """How a model trained by it predicts single words; None where it does not learn to."""
        return None

    @property
    def pair_scorer(self) -> PairScorer | None:
        """How its own head scores pairs, of an objective that can match."""
        return None

    @property
    def matching_head(self) -> tuple[nn.Linear, nn.Linear] | None:
        """The pooler of the summary and the classifier (no match, match) that retrieval may be fine-tuned from."""
        return None


class PairObjective(Objective):
    """Couples the rows of a batch: embeds each part of it, then scores the whole. The loop may embed the micro-batches of
    a step one by one, score all of them at once, and hand each its share of the gradient (`training/gradient_cache.py`)."""

    abilities: frozenset[Ability] = frozenset({"embed"})

    @abc.abstractmethod
    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Embeddings [B ...] that gradients flow into; whatever is drawn is a function of `batch.seed`, so that a second
        call gives the same."""

    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        """What else is scored, [B ...] and without gradients: the keys of a momentum copy. Made once a step."""
        return ()

    def everyone(self, rows: Tensor, least: int = 2) -> tuple[Tensor, int]:
        """Rows of all ranks, and where this rank's begin. In validation each rank scores its own batches alone: ranks
        may have different numbers of them. Raises UserError for fewer than `least` rows."""
        if not self.training:
            return rows, 0
        gathered, first = dist.gather(rows)
        if len(gathered) < least:
            raise UserError(
                f"a contrastive objective tells the pairs of a batch apart and this one has a single readable pair; "
                f"{MORE_ROWS}"
            )
        return gathered, first

    @abc.abstractmethod
    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """Losses of all rows of this rank; `rows` are `embed`'s tensors, then `constants`'."""

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        return self.score(*self.embed(model, image_BKD, batch), *self.constants(model, batch))


class ObjectiveConfig(abc.ABC):
    """What a recipe says of an objective: a frozen dataclass that builds it.

    Attributes:
        baseline: whether it is the usual method, against which a comparison times the others.
    """

    baseline: ClassVar[bool] = False

    @abc.abstractmethod
    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Objective:
        """`tokenizer` tells which ids are special and which start a word."""
