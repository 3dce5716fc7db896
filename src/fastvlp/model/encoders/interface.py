"""What the rest of the package asks of an image or a text encoder.

An encoder is a frozen dataclass, its config, and the module that `config.build()` makes. Both may live in a user's own file.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
        """The state dict of the module that a run starts from where it names no other weights; None: new weights."""
        return None

    def normal_form(self) -> ImageEncoderConfig:
        """The same encoder, written as two configs must be that are compared field by field. Here: as it is."""
        return self

    def check(self) -> None:
        """Raises UserError where fields do not fit together, or one that a subclass has to add is missing."""
        require_fields(self, width="the numbers in a state", grid="the cells a side of the map")
        if self.size < 1:
            raise UserError(f"`model.image.size` is a number of pixels, 1 or more, not {self.size}")

    def at_size(self, size: int) -> ImageEncoderConfig:
        """The config by which the module encodes images of another size. Raises UserError where it encodes one size alone."""
        if size != self.size:
            raise UserError(
                f"`model.image` is a {type(self).__name__}, which encodes images of {self.size} pixels, not of {size}"
            )
        return self

    def check_can_drop(self) -> None:
        """Raises UserError where all patches of an image are needed."""
        if not self.can_drop_patches:
            raise UserError(
                f"`model.image` is a {type(self).__name__}, which encodes whole images: it cannot leave out patches; "
                "set every share of patches that are encoded (`keep`) to 1"
            )

    def random_patches(self, seed_B: Tensor, keep: float, image: Tensor | None = None) -> Tensor | None:
        """Sorted indices [B K] of the cells that each row encodes, drawn by the row's seed; None for all of them. `image`: the
        pixels, which may be of another size than the config's.

        Raises UserError where patches cannot be left out.
        """
        if keep >= 1:
            return None
        self.check_can_drop()
        grid = self.grid if image is None or image.ndim != 4 else self.at_size(image.shape[-1]).grid
        return random_keep(seed_B, grid**2, keep)


class ImageEncoder(nn.Module, abc.ABC):
    """Pixels to states."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def normalised(self, image: Tensor) -> Tensor:
        """Pixels [B 3 H W] with the config's mean and std removed; an image that is not uint8 is returned as it is."""
        if image.dtype != torch.uint8:
            return image
        return (image.to(self.mean.dtype) / 255 - self.mean) / self.std

    @abc.abstractmethod
    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Encodes images, uint8 [B 3 H W] -> [B prefix+N D], or [B prefix+K D] of the cells in `keep_BK` alone, in their
        order. `keep_BK` is None where the config cannot drop patches."""

    def start_positions(self) -> None:
        """Sets positions that do not begin at random numbers, after all new weights were drawn. Here: there are none."""

    def public_module(self) -> nn.Module | None:
        """The model of transformers that computes the states, where one does."""
        return None

    def layer_names(self) -> LayerNames:
        """Its parts in the order in which they compute: to train the last layers alone, or each at a rate of its own."""
        return find_layers(self)

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The saved weights of the same encoder for another image size, made to fit this one. Here: as they are."""
        return dict(state)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(abc.ABC):
    """A text encoder: its fields are options of the command line, and are saved with the model.

    A subclass has `width` and `depth` as fields or properties.
    """

    positions: int
    """Longest text, in tokens."""
    vocab: int = 0
    """Words of the vocabulary. This and the four ids below are filled in from the tokenizer."""
    pad: int = 0
    """Id of padding."""
    bos: int = 0
    """Id of <s>, which begins each text."""
    eos: int = 0
    """Id of </s>, which ends each text."""
    mask: int = 0
    """Id of the token that stands for a hidden word."""

    present: ClassVar[bool] = True
    """Whether it encodes texts, and is no stand-in of a model without a text encoder."""

    if TYPE_CHECKING:

        @property
        @abc.abstractmethod
        def width(self) -> int:
            """Numbers in each state."""

        @property
        @abc.abstractmethod
        def depth(self) -> int:
            """Layers. FLM's reconstructor reads the states after each."""

    @property
    def final_norm(self) -> bool:
        """Whether the last states are normalised already; otherwise what reads them has a norm of its own."""
        return True

    @property
    def norm_eps(self) -> float:
        """Epsilon of the norms that follow the last states."""
        return 1e-5

    @abc.abstractmethod
    def build(self) -> TextEncoder:
        """A module with new weights."""

    def check(self) -> None:
        """Raises UserError where fields do not fit together, or one that a subclass has to add is missing."""
        require_fields(self, width="the numbers in a state", depth="the number of layers")
        if self.positions < 1:
            raise UserError(f"`model.text.positions` is a number of tokens, 1 or more, not {self.positions}")

    def with_depth(self, depth: int) -> TextEncoderConfig:
        """The same encoder with its first `depth` layers; of 0 layers, its embedding alone. Raises UserError where its depth
        is fixed."""
        raise UserError(f"`model.text` is a {type(self).__name__}, whose number of layers is fixed")


class TextEncoder(nn.Module, abc.ABC):
    """Token ids to states. A mask is a boolean tensor that broadcasts to [B 1 L L], True where row sees column."""

    @property
    @abc.abstractmethod
    def word_table(self) -> Tensor:
        """The vectors of the vocabulary [V D]; a vocabulary head may share them."""

    @abc.abstractmethod
    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind: Tensor | None = None) -> Tensor:
        """Vectors of ids at positions (either may have one row for all) -> [B L D], before any layer. `kind` is a type
        vector [D], or one for each token [B L D], that is added before the norm."""

    @abc.abstractmethod
    def states(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> list[Tensor]:
        """The embedding, then the states after each layer: depth + 1 tensors [B L D]. With `causal` a token sees itself and
        those before it; `mask` and `causal` are not given together."""

    def forward(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """The last of `states`: [B L D]."""
        return self.states(ids_BL, position_BL, mask=mask, causal=causal)[-1]

    @abc.abstractmethod
    def empty_past(self, like_B: Tensor) -> list[KeyValue]:
        """Keys and values of no token, for each layer: as many rows as `like_B`, on its device and of its dtype."""

    @abc.abstractmethod
    def step(self, ids_B1: Tensor, position_B1: Tensor, past: list[KeyValue]) -> Tensor:
        """The last state of one more token of each row, read left to right -> [B 1 D]. `past` grows in place."""

    def public_module(self) -> nn.Module | None:
        """The model of transformers that computes the states, where one does."""
        return None

    def layer_names(self) -> LayerNames:
        """Its parts in the order in which they compute: to train the last layers alone, or each at a rate of its own."""
        return find_layers(self)

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The saved weights of the same encoder with other positions, made to fit this one. Here: as they are."""
        return dict(state)
