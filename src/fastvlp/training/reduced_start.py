"""A cheaper beginning of a run: smaller images, a share of the patches, shorter texts, or several of these (RECLIP, arXiv
2304.06028; FLIP, 2212.00794; CLIPA, 2305.07017). The rest of the run, a short one, sees whole images of full size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.config import Count, PositiveShare, ShareBelowOne
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ReducedStart:
    """How much of images and texts is encoded in the first part of a run."""

    share: ShareBelowOne = 0.0
    """Share of the run, from its beginning, that is reduced; 0: none of it."""
    size: Count | None = None
    """Side of the images then, in pixels; None: that of the model. Positions are resized on the way (FlexiViT, arXiv
    2212.08013)."""
    keep: PositiveShare | None = None
    """Share of the patches that are encoded then; None: `keep`."""
    max_length: Count | None = None
    """The most tokens of a text then, including `<s>` and `</s>`; None: `data.max_length`."""

    def check(self, model: ModelConfig) -> None:
        """Raises UserError where the model cannot be trained so."""
        changes = {"size": self.size, "keep": self.keep, "max_length": self.max_length}
        given = [f"`reduced.{name}`" for name, value in changes.items() if value is not None]
        if bool(given) != bool(self.share):
            raise UserError(
                f"{' and '.join(given)} count for the first part of a run; give `reduced.share` too, such as 0.9"
                if given
                else "`reduced.share` says for how long; give `reduced.size`, `keep` or `max_length` too"
            )
        if self.keep is not None and self.keep < 1:
            model.image.check_can_drop()
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"`reduced.max_length` counts <s> and </s>: it is 2 or more, not {self.max_length}")
        if self.size is not None:
            self._check_size(self.size, model)

    def _check_size(self, size: int, model: ModelConfig) -> None:
        if size > model.image.size:
            raise UserError(f"`reduced.size` {size} is larger than the model's images of {model.image.size} pixels")
        pools_regions = model.embed is not None and model.embed.image.regions is not None
        if pools_regions or model.single is not None:
            raise UserError("`reduced.size`: regions are pooled from a map of one size; leave it out")
        model.image.at_size(size).check()

    def holds(self, progress: float) -> bool:
        """Whether a step at this progress of the run, 0 to 1, is reduced."""
        return progress < self.share

    def reduce(self, batch: Batch, eos: int) -> Batch:
        """The batch with smaller images and shorter texts. `eos`: id of </s>, with which a text that is cut still ends."""
        if self.size is not None and batch.image.ndim == 4:
            plain = None if batch.plain is None else resize(batch.plain, self.size)
            batch = replace(batch, image=resize(batch.image, self.size), plain=plain)
        return batch if self.max_length is None else cut_texts(batch, self.max_length, eos)


def resize(image_BCHW: Tensor, size: int) -> Tensor:
    """uint8 images of another size, by an antialiased bilinear filter."""
    if image_BCHW.shape[-1] == size:
        return image_BCHW
    smaller = F.interpolate(image_BCHW.float(), size=(size, size), mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(image_BCHW.dtype)


def cut_texts(batch: Batch, most: int, eos: int) -> Batch:
    """Texts of at most so many tokens. One that is cut ends with </s>."""
    ids = batch.ids[:, :most]
    cut_B1 = batch.length[:, None] > most
    last_L = torch.arange(ids.shape[1], device=ids.device) == most - 1
    return replace(batch, ids=ids.masked_fill(cut_B1 & last_L, eos), length=batch.length.clamp(max=most))
