"""The interface of an objective. It computes losses of a batch, and states the abilities of a model that is trained by it."""

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

# Abilities of a model. embed: it computes unit vectors of images and texts that can be compared. write: it writes a text left
# to right, given an image. match: it scores how well a text matches an image. answer: it chooses among answers. The last two
# use the objective's own head.
Ability = Literal["embed", "write", "match", "answer"]
HEAD_ABILITIES: frozenset[Ability] = frozenset({"match", "answer"})
# Image states [B K D] and an uncorrupted batch -> a prediction for each token, int64 [B L]. No token may be used to predict
# itself.
ClozeMethod = Callable[[VLModel, Tensor, Batch], Tensor]
# Image states [B K D] (or [1 K D], one image for all texts), token ids [B L] and lengths [B] -> match scores [B].
PairScorer = Callable[[VLModel, Tensor, Tensor, Tensor], Tensor]

MORE_ROWS = (
    "raise `data.batch_size`; if `data.max_tokens` is given, raise that instead, since it sets the number of rows"
)


@dataclass(frozen=True)
class Loss:
    """A loss, as its sum over targets and the number of targets. Only `combine` divides, once, by the count of the whole
    step."""

    total: Tensor
    count: Tensor
    weight: float = 1.0


register_dataclass_node(Loss)


def constant(value: float, like: Tensor) -> Tensor:
    """A single number of the type of `like`, made on its device: copying it there from the CPU would wait for all that the
    device has to do."""
    return like.new_full((), value)


def combine(losses: Mapping[str, Loss], counts: Mapping[str, Tensor] | None = None) -> Tensor:
    """Returns the sum of weight * total / count over all losses.

    `counts`: number of targets of each loss in the whole step, over all micro-batches and ranks, so that the loss does not
    depend on how a step is divided. A loss without an entry is divided by its own count.
    """
    counts = counts or {}
    parts = [loss.weight * loss.total / counts.get(name, loss.count).clamp(min=1) for name, loss in losses.items()]
    return sum(parts[1:], start=parts[0])


class Objective(nn.Module, abc.ABC):
    """An objective: it computes losses of a batch. It owns only parameters that are not needed after training, except for the
    head of an ability.

    Attributes:
        reading: how the model should read a text in later tasks.
        bos: what `<s>` attends to, if the objective reads texts left to right; None if it does not.
        reads_mask: whether the objective uses the mask token.
        cloze_context: the words that `cloze_method` uses to predict a word: all other words, or the words before it.
        abilities: abilities of a model that is trained by the objective. They are saved with the weights.
        image_use: the least processed form of the images that it reads: their vectors in the joint space (`embed_image`), the
            states that it is given, or their pixels. States of a frozen encoder are stored; pixels are decoded at each step.
        text_use: the least processed form of the texts that it reads: their vectors in the joint space (`embed_text`), or their
            words.
        contrasts: whether the texts of other rows are negatives for a row's image. The log then shows how many rows are equal,
            validation batches have a fixed number of rows, and a single row has no loss in validation.
        teacher: folder of the teacher whose stored vectors are added to the batches; None without a teacher.
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
        """Whether only the shares of images and texts that the options state are encoded: in training, and in validation only
        with `masked_validation`."""
        return self.training or self.masked_validation

    @abc.abstractmethod
    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """Returns the losses of a batch by name. The batch is not corrupted yet. All random draws are functions of
        `batch.seed`."""

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the counts that `forward` will return. They are computed from the batch only, before the model has run."""

    def check(self, samples: Iterator[Batch]) -> None:
        """Checks the data once, when a run starts. `samples` yields single rows that are spread over the data; each is read
        when it is requested. By default nothing is checked, since most objectives detect missing data in the first batch.

        Raises UserError if the data lack something that the objective needs.
        """

    def begin(self, model: VLModel) -> None:
        """Runs once before the first step, on new or inherited weights. By default does nothing."""

    def after_step(self, model: VLModel) -> None:
        """Runs after each optimiser step, for example to update a momentum copy. By default does nothing."""

    def kept(self) -> dict[str, Tensor]:
        """Returns the tensors of its state that are saved with the weights, by default all. Leave out those that only training
        reads."""
        return self.state_dict()

    def reaches_all(self, model: ModelConfig) -> bool:
        """Whether each step gives a gradient to every parameter of the encoders, fusion layers, head and reconstructor. If so,
        DDP need not search for parameters without a gradient."""
        return False

    def chance_losses(self, rows: int) -> Mapping[str, float]:
        """Returns by name the losses of a model that guesses among the rows of a step, if they are known."""
        return {}

    @property
    def cloze_method(self) -> ClozeMethod | None:
        """The function that predicts single words with a trained model; None if the objective does not train this."""
        return None

    @property
    def next_word_method(self) -> ClozeMethod | None:
        """The function that predicts each word from the words before it; None if the objective does not train this."""
        return self.cloze_method if self.cloze_context == "before" else None

    @property
    def pair_scorer(self) -> PairScorer | None:
        """The function that scores pairs with the objective's own head; None if it has no such head."""
        return None

    @property
    def matching_head(self) -> tuple[nn.Linear, nn.Linear] | None:
        """The pooler and the classifier (no match, match) from which retrieval can be fine-tuned; None if it has none."""
        return None


class PairObjective(Objective):
    """An objective whose loss depends on all rows of a step together, such as a contrastive loss.

    It embeds rows, and then scores all rows of the step. With several micro-batches, the training loop embeds each of them,
    scores all rows at once, and passes the gradient back to each micro-batch (`training/gradient_cache.py`).
    """

    abilities: frozenset[Ability] = frozenset({"embed"})
    contrasts: bool = True

    @abc.abstractmethod
    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Returns embeddings [B ...] that get gradients. All random draws are functions of `batch.seed`, so that a second call
        gives the same embeddings."""

    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        """Returns further tensors [B ...] for `score`, without gradients, such as the keys of a momentum copy."""
        return ()

    def gather_rows(self, rows: Tensor, least: int = 2) -> tuple[Tensor, int]:
        """Gathers rows from all ranks, [B ...] -> [M ...]. Also returns the index at which the rows of this rank begin.

        In validation, `rows` are returned unchanged, since they already come from all ranks (`training/validation.py`). Raises
        UserError for fewer than `least` rows.
        """
        if not self.training:
            return rows, 0
        gathered, first = dist.gather(rows)
        if len(gathered) < least:
            raise UserError(
                f"a contrastive objective compares the pairs of a batch, but this batch has only one readable pair; {MORE_ROWS}"
            )
        return gathered, first

    def gather_contents(self, *own_B2: Tensor) -> Content:
        """Gathers the `contents` of the rows of this rank and of all ranks. Without an argument, equal pairs are used as
        negatives."""
        (content_B2,) = own_B2 or (None,)
        return ANY_CONTENT if content_B2 is None else (content_B2, self.gather_rows(content_B2, least=1)[0])

    @abc.abstractmethod
    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """Returns the losses of the rows of this rank. `rows` are the tensors of `embed`, then those of `constants`."""

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        return self.score(*self.embed(model, image_BKD, batch), *self.constants(model, batch))


class ObjectiveConfig(abc.ABC):
    """Config of an objective: a frozen dataclass with its options, which builds it. A recipe has one or several.

    Attributes:
        baseline: whether it is a standard method, to which a comparison compares the time of the others.
    """

    baseline: ClassVar[bool] = False

    @abc.abstractmethod
    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Objective:
        """Builds the objective for a model. `tokenizer`: knows which ids are special tokens, and which begin a word."""

    def with_teacher(self, folder: str) -> ObjectiveConfig:
        """Returns these options with another teacher, if the objective has one."""
        return self
