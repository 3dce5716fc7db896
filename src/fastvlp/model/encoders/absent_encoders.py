"""Stand-ins for an encoder that a model lacks: a public image encoder alone has no text encoder, and the reverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig


def absent(part: str) -> NoReturn:
    raise UserError(
        f"the model has no {part} encoder, because the public model that it was converted from has none. Start a run that "
        "adds one, with `vlp pretrain RECIPE --from FOLDER`"
    )


@dataclass(frozen=True, kw_only=True)
class AbsentImagesConfig(ImageEncoderConfig):
    """No image encoder. Heads of a joint space may still read states that another network computes."""

    width: int
    """Numbers in each state that the heads read."""
    grid: int = 1
    """Cells a side of the map that they read."""

    present: ClassVar[bool] = False
    """It stands for an encoder that is not there."""

    def build(self) -> AbsentImages:
        return AbsentImages(self)


class AbsentImages(ImageEncoder):
    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        absent("image")


@dataclass(frozen=True, kw_only=True)
class AbsentTextsConfig(TextEncoderConfig):
    """No text encoder."""

    width: int
    """Numbers in each state that a text encoder would have."""
    depth: int = 0
    """Layers that it would have."""

    present: ClassVar[bool] = False
    """It stands for an encoder that is not there."""

    def build(self) -> AbsentTexts:
        return AbsentTexts()


class AbsentTexts(TextEncoder):
    @property
    def word_table(self) -> Tensor:
        absent("text")

    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind: Tensor | None = None) -> Tensor:
        absent("text")

    def states(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> list[Tensor]:
        absent("text")
