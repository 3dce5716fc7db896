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
from fastvlp.objectives.tiled import ANY_CONTENT, Content

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

MORE_ROWS = (
    "raise `data.batch_size`, or `data.max_tokens` where it is given, since it then decides how many rows a batch has"
)


@dataclass(frozen=True)
class Loss:
    """The sum of a loss over its targets, and how many there were. Only `combine` divides, once, by the count of the step."""

    total: Tensor
    count: Tensor
    weight: float = 1.0


register_dataclass_node(Loss)


def combine(losses: Mapping[str, Loss], counts: Mapping[str, Tensor] | None = None) -> Tensor:
    """The sum of weight * total / count over all losses.

    `counts`: targets of the whole step, over micro-batches and ranks, so that the loss does not depend on how a step is cut
    into these. A loss without an entry is divided by its own count.
    """
    counts = counts or {}
    parts = [loss.weight * loss.total / counts.get(name, loss.count).clamp(min=1) for name, loss in losses.items()]
    return sum(parts[1:], start=parts[0])


class Objective(nn.Module, abc.ABC):
    """What is learned from a batch. It owns only parameters that nobody needs after training, except the head of an ability.

    Attributes:
        reading: how the model best reads a text for a task later.
        bos: what `<s>` sees where the objective reads left to right; None where it does not read so.
        reads_mask: whether it reads the token that stands for a hidden word.
        cloze_context: what `cloze_method` reads of a text beside the word: all others, or those before it.
        abilities: what a model trained by it can do. They are saved with the weights.
        image_use: the least that it reads of a batch's images: their vectors in the joint space (`embed_image`), the states
            that it gets, or their pixels. States of a frozen encoder are stored, pixels are decoded at each step.
        text_use: the least that it reads of the texts: their vectors in the joint space (`embed_text`), or their words.
        contrasts: whether a row's text is wrong for the images of other rows, so that the log tells how many rows are equal.
            A single row then has no loss in validation, whose batches have a fixed number of rows.
        teacher: folder of the model whose stored vectors the batches bring; None without one.
        masked_validation: whether validation encodes the same shares of images and texts as training.
    """

    reading: Reading = "full"
    bos: Bos | None = None
    reads_mask: bool = False
    cloze_context: Literal["both", "before"] = "both"
    abilities: frozenset[Ability] = frozenset()
    image_use: ImageUse = "states"
    text_use: TextUse = "words"
    contrasts: bool = False
    masked_validation: bool = False
    teacher: str | None = None

    @property
    def drops_parts(self) -> bool:
        """Whether images and texts are encoded in part, where the options say so: in training, since a trained model sees them
        whole."""
        return self.training or self.masked_validation

    @abc.abstractmethod
    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """Named losses of a clean batch. Everything random is a function of `batch.seed`."""

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The counts that `forward` will return, from the batch alone, before the model has run."""

    def check(self, samples: Iterator[Batch]) -> None:
        """Runs once, when a run starts. `samples` yields single rows from all over its data, each read when it is taken.

        Raises UserError where the data lacks what the objective needs. Most objectives find out with the first batch.
        """

    def begin(self, model: VLModel) -> None:
        """Runs once, on new or inherited weights, before the first step. Most objectives have nothing to do."""

    def after_step(self, model: VLModel) -> None:
        """Runs after each optimiser step, such as to update a momentum copy. Most objectives have nothing to do."""

    def kept(self) -> dict[str, Tensor]:
        """Which tensors of its state are saved with the weights: by default all. Leave out what only training reads."""
        return self.state_dict()

    def reaches_all(self, model: ModelConfig) -> bool:
        """Whether each step surely gives a gradient to every parameter of the encoders, fusion, its head and reconstructor.
        DDP then need not search for parameters without one."""
        return False

    def chance_losses(self, rows: int) -> Mapping[str, float]:
        """By name, the losses of a model that can only guess among the rows of a step, as far as they are known."""
        return {}

    @property
    def cloze_method(self) -> ClozeMethod | None:
        """How a model trained by it predicts single words; None where it does not learn to."""
        return None

    @property
    def next_word_method(self) -> ClozeMethod | None:
        """How it predicts each word from those before it; None where it does not learn to."""
        return self.cloze_method if self.cloze_context == "before" else None

    @property
    def pair_scorer(self) -> PairScorer | None:
        """How the objective's own head scores pairs, if it can match."""
        return None

    @property
    def matching_head(self) -> tuple[nn.Linear, nn.Linear] | None:
        """The pooler of the summary and the classifier (no match, match) that retrieval may be fine-tuned from."""
        return None


class PairObjective(Objective):
    """An objective that couples the rows of a batch: it embeds rows, then scores all rows of a step together.

    With several micro-batches the loop embeds each of them, scores all at once, and passes each its part of the gradient
    (`training/gradient_cache.py`).
    """

    abilities: frozenset[Ability] = frozenset({"embed"})
    contrasts: bool = True

    @abc.abstractmethod
    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Embeddings [B ...] that get gradients. Everything random is a function of `batch.seed`, so that a second call gives
        the same."""

    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        """Further tensors [B ...] that `score` reads, without gradients, such as the keys of a momentum copy."""
        return ()

    def gather_rows(self, rows: Tensor, least: int = 2) -> tuple[Tensor, int]:
        """Rows of all ranks, [B ...] -> [M ...], and where this rank's begin.

        In validation they are the `rows` alone, which come from all ranks (`training/validation.py`). Raises UserError for
        fewer than `least` rows.
        """
        if not self.training:
            return rows, 0
        gathered, first = dist.gather(rows)
        if len(gathered) < least:
            raise UserError(
                f"a contrastive objective compares the pairs of a batch, and this one has a single readable pair; "
                f"{MORE_ROWS}"
            )
        return gathered, first

    def gather_contents(self, *own_B2: Tensor) -> Content:
        """The `contents` of the rows of this rank and of all ranks; of none, where equal pairs are not left out."""
        (content_B2,) = own_B2 or (None,)
        return ANY_CONTENT if content_B2 is None else (content_B2, self.gather_rows(content_B2, least=1)[0])

    @abc.abstractmethod
    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """Losses of all rows of this rank. `rows` are the tensors of `embed`, then those of `constants`."""

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        return self.score(*self.embed(model, image_BKD, batch), *self.constants(model, batch))


class ObjectiveConfig(abc.ABC):
    """The options of an objective: a frozen dataclass that builds it. A recipe names one or several.

    Attributes:
        baseline: whether it is the usual method, against which a comparison times the others.
    """

    baseline: ClassVar[bool] = False

    @abc.abstractmethod
    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Objective:
        """The objective for this model. `tokenizer` says which ids are special and which start a word."""

    def with_teacher(self, folder: str) -> ObjectiveConfig:
        """These options, with another teacher where there is one."""
        return self
