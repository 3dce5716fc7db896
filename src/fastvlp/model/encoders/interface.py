"""The interface of image and text encoders, which the rest of the package uses.

An encoder is a frozen dataclass, its config, and the module that `config.build()` makes. Both may live in a user's own file.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastvlp.config import Count, Positive
from fastvlp.errors import UserError
from fastvlp.model.encoders.layer_names import LayerNames, find_layers
from fastvlp.model.keep import random_keep
from fastvlp.model.layers import KeyValue


def require_fields(config: object, **meanings: str) -> None:
    """Raises UserError if a config lacks one of these names, as a field or a property."""
    if missing := [name for name in meanings if not hasattr(config, name)]:
        raise UserError(
            f"{type(config).__name__}: add "
            + " and ".join(f"`{name}`, {meanings[name]}," for name in missing)
            + " as a field or a property"
        )


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(abc.ABC):
    """Config of an image encoder. Its fields are options of the command line, and are saved with the model.

    The encoder turns an image into `prefix` tokens, such as a class token, followed by a square map of `grid` x `grid` cells,
    row by row. A subclass has `width` and `grid` as fields or properties.
    """

    size: Count
    """Side of the square image, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each channel, which is subtracted from the pixels after they are scaled to 0..1; CLIP's values by default."""
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each channel, by which the pixels are then divided."""

    can_drop_patches: ClassVar[bool] = False
    """Whether the encoder can encode only some cells of the map (`keep_BK`), at a cost in proportion to their number."""
    present: ClassVar[bool] = True
    """Whether it encodes images; False for the placeholder in a model without an image encoder."""

    # Only for type checkers: a property here would hide a field of the same name that has no default.
    if TYPE_CHECKING:

        @property
        @abc.abstractmethod
        def width(self) -> int:
            """The dimension of each state."""

        @property
        @abc.abstractmethod
        def grid(self) -> int:
            """The number of cells on each side of the map."""

    @property
    def prefix(self) -> int:
        """The number of states before the map."""
        return 0

    @property
    def tokens(self) -> int:
        """The number of states of a whole image."""
        return self.grid**2 + self.prefix

    @abc.abstractmethod
    def build(self) -> ImageEncoder:
        """Builds the encoder, with new weights."""

    def starting_weights(self) -> Mapping[str, Tensor] | None:
        """Returns the state dict of the encoder that a run starts from if it names no other weights; None for new weights."""
        return None

    def normal_form(self) -> ImageEncoderConfig:
        """Returns an equal encoder in the form in which two configs can be compared field by field. Here: no change."""
        return self

    def check(self) -> None:
        """Raises UserError if fields do not fit together, or if a subclass lacks a field that it has to add."""
        require_fields(self, width="the dimension of a state", grid="the number of cells on each side of the map")
        if self.size < 1:
            raise UserError(f"`model.image.size` is a number of pixels, 1 or more, not {self.size}")

    def at_size(self, size: int) -> ImageEncoderConfig:
        """Returns the config for images of another size. Raises UserError if the encoder supports only one size."""
        if size != self.size:
            raise UserError(
                f"`model.image` is a {type(self).__name__}, which encodes images of {self.size} pixels only, not of {size}"
            )
        return self

    def check_can_drop(self) -> None:
        """Raises UserError if the encoder needs all patches of an image."""
        if not self.can_drop_patches:
            raise UserError(
                f"`model.image` is a {type(self).__name__}, which encodes whole images: it cannot leave out patches; "
                "set every share of patches that are encoded (`keep`) to 1"
            )

    def random_patches(self, seed_B: Tensor, keep: float, image: Tensor | None = None) -> Tensor | None:
        """Draws the cells that each row encodes, by the row's seed. Returns their sorted indices [B K], or None for all cells.
        `image`: the pixels, which may have another size than the config.

        Raises UserError if patches cannot be left out.
        """
        if keep >= 1:
            return None
        self.check_can_drop()
        grid = self.grid if image is None or image.ndim != 4 else self.at_size(image.shape[-1]).grid
        return random_keep(seed_B, grid**2, keep)


class ImageEncoder(nn.Module, abc.ABC):
    """Encodes pixels to states."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def normalised(self, image: Tensor) -> Tensor:
        """Normalises uint8 pixels [B 3 H W] by the config's mean and std. An image of another type is returned unchanged."""
        if image.dtype != torch.uint8:
            return image
        return (image.to(self.mean.dtype) / 255 - self.mean) / self.std

    @abc.abstractmethod
    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Encodes images, uint8 [B 3 H W] -> [B prefix+N D]. With `keep_BK` only these cells are encoded, in their order ->
        [B prefix+K D]. `keep_BK` is always None if the config cannot drop patches."""

    def start_positions(self) -> None:
        """Sets position embeddings that do not start from random numbers. It is called after all new weights were drawn. Here:
        does nothing."""

    def public_module(self) -> nn.Module | None:
        """Returns the transformers model that computes the states; None if there is none."""
        return None

    def layer_names(self) -> LayerNames:
        """Returns the names of the encoder's layers in their order, so that the last layers can be trained, or each layer at a
        rate of its own."""
        return find_layers(self)

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resizes saved weights of the same encoder with another image size to fit this one. Here: returns them unchanged."""
        return dict(state)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(abc.ABC):
    """Config of a text encoder. Its fields are options of the command line, and are saved with the model.

    A subclass has `width` and `depth` as fields or properties.
    """

    positions: int
    """Number of positions: the largest number of tokens of a text."""
    vocab: int = 0
    """Size of the vocabulary. This and the four ids below are filled in from the tokenizer."""
    pad: int = 0
    """Id of padding."""
    bos: int = 0
    """Id of <s>, which begins each text."""
    eos: int = 0
    """Id of </s>, which ends each text."""
    mask: int = 0
    """Id of the token that stands for a hidden word."""

    present: ClassVar[bool] = True
    """Whether it encodes texts; False for the placeholder in a model without a text encoder."""

    if TYPE_CHECKING:

        @property
        @abc.abstractmethod
        def width(self) -> int:
            """The dimension of each state."""

        @property
        @abc.abstractmethod
        def depth(self) -> int:
            """The number of layers. FLM's reconstructor attends to the states after each layer."""

    @property
    def final_norm(self) -> bool:
        """Whether the last states are already normalised; otherwise the parts that read them have a norm of their own."""
        return True

    @property
    def norm_eps(self) -> float:
        """The epsilon of the norms that follow the last states."""
        return 1e-5

    @abc.abstractmethod
    def build(self) -> TextEncoder:
        """Builds the encoder, with new weights."""

    def check(self) -> None:
        """Raises UserError if fields do not fit together, or if a subclass lacks a field that it has to add."""
        require_fields(self, width="the dimension of a state", depth="the number of layers")
        if self.positions < 1:
            raise UserError(f"`model.text.positions` is a number of tokens, 1 or more, not {self.positions}")

    def with_depth(self, depth: int) -> TextEncoderConfig:
        """Returns the config of the same encoder with only its first `depth` layers (0: only its embedding). Raises UserError
        if the number of layers is fixed."""
        raise UserError(f"`model.text` is a {type(self).__name__}, whose number of layers is fixed")


class TextEncoder(nn.Module, abc.ABC):
    """Encodes token ids to states. A mask is a boolean tensor that broadcasts to [B 1 L L], True where a row attends to a
    column."""

    @property
    @abc.abstractmethod
    def word_table(self) -> Tensor:
        """The word embeddings [V D]; a vocabulary head may share them."""

    @abc.abstractmethod
    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind: Tensor | None = None) -> Tensor:
        """Embeds ids at positions (one of the two may have a single row for all) -> [B L D], before any layer. `kind`: a type
        vector [D], or one for each token [B L D], that is added before the norm."""

    @abc.abstractmethod
    def states(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> list[Tensor]:
        """Returns the embeddings and the states after each layer: depth + 1 tensors [B L D]. With `causal` a token attends to
        itself and the tokens before it. `mask` and `causal` cannot be combined.

        Raises UserError if the encoder cannot read in the way that `causal` or this kind of mask asks for.
        """

    def forward(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Returns the last of `states`, [B L D]."""
        return self.states(ids_BL, position_BL, mask=mask, causal=causal)[-1]

    def empty_past(self, like_B: Tensor) -> Any:
        """Returns what `step` keeps of each text, before its first token: tensors whose rows are those of `like_B`, on its
        device, in lists, tuples, dicts, `KeyValue`s or another pytree. Here: one `KeyValue`, of the ids and positions of the
        tokens so far."""
        empty = torch.empty(len(like_B), 1, 0, 1, dtype=torch.int64, device=like_B.device)
        return [KeyValue(empty, empty)]

    def step(self, ids_B1: Tensor, position_B1: Tensor, past: Any) -> Tensor:
        """Reads one more token of each row, left to right, and returns its last state [B 1 D], that of causal `states`. Extends
        `past` in place, for example by assigning to an element of a list. Between steps, beam search chooses and reorders the
        rows of its tensors. Here: encodes all tokens so far again."""
        past[0].extend(ids_B1[:, None, :, None], position_B1.expand_as(ids_B1)[:, None, :, None])
        ids_BL, position_BL = past[0].key[:, 0, :, 0], past[0].value[:, 0, :, 0]
        return self.states(ids_BL, position_BL, causal=True)[-1][:, -1:]

    def public_module(self) -> nn.Module | None:
        """Returns the transformers model that computes the states; None if there is none."""
        return None

    def layer_names(self) -> LayerNames:
        """Returns the names of the encoder's layers in their order, so that the last layers can be trained, or each layer at a
        rate of its own."""
        return find_layers(self)

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resizes saved weights of the same encoder with another number of positions to fit this one. Here: returns them
        unchanged."""
        return dict(state)
