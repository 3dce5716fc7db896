"""FLM's two directions of a text (arXiv 2303.14038, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """States of FLM's two directions. Row 2b is the forward stream of text b, and row 2b+1 its reverse stream. [B*2 L D] viewed
    as [B 2L D] is therefore the list of keys that the reconstructor attends to."""

    bottom: list[Tensor]  # after each layer of the text encoder
    top: list[Tensor]  # after each fusion layer
    forward_L: Tensor  # the text position of each forward column
    reverse_BL: Tensor  # the text position of each reverse column, -1 for padding
    first: int  # the first forward position that a query may attend to


def reverse_text(x_BL: Tensor, length_B: Tensor) -> Tensor:
    """Reverses the real tokens of each row, [B L] or [B L D], and leaves padding where it is. It is its own inverse."""
    position = torch.arange(x_BL.shape[1], device=x_BL.device)
    source = torch.where(position < length_B[:, None], length_B[:, None] - 1 - position, position)
    return x_BL.gather(1, source if x_BL.dim() == 2 else source[..., None].expand_as(x_BL))
