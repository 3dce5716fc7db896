"""Smaller inputs in the first part of a run: smaller images, a share of the patches, shorter texts, or several of these
(RECLIP, arXiv 2304.06028; FLIP, 2212.00794; CLIPA, 2305.07017). The short rest of the run sees whole images and texts of full
size."""

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
    """The sizes of images and texts in the first part of a run."""

    share: ShareBelowOne = 0.0
    """Share of the run, from its beginning, that has smaller inputs; 0: no part of it."""
    size: Count | None = None
    """Side of the images in this part, in pixels; None: as in the model. Position embeddings are resized to it (FlexiViT, arXiv
    2212.08013)."""
    keep: PositiveShare | None = None
    """Share of the patches that are encoded in this part; None: `keep`."""
    max_length: Count | None = None
    """Largest number of tokens of a text in this part, including `<s>` and `</s>`; None: `data.max_length`."""

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if the model cannot be trained with these inputs."""
        changes = {"size": self.size, "keep": self.keep, "max_length": self.max_length}
        given = [f"`reduced.{name}`" for name, value in changes.items() if value is not None]
        if bool(given) != bool(self.share):
            raise UserError(
                f"{' and '.join(given)}: only used in the first part of a run; give `reduced.share` too, such as 0.9"
                if given
                else "`reduced.share` only says for how long inputs are reduced; give `reduced.size`, `keep` or "
                "`max_length` too"
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
            raise UserError(
                "`reduced.size` cannot be used with regions, which are pooled from a map of one size; leave it out"
            )
        model.image.at_size(size).check()

    def holds(self, progress: float) -> bool:
        """Whether a step at this progress of the run (0 to 1) has reduced inputs."""
        return progress < self.share

    def reduce(self, batch: Batch, eos: int) -> Batch:
        """Returns the batch with smaller images and shorter texts. `eos`: id of </s>, which ends a text after it is cut."""
        if self.size is not None and batch.image.ndim == 4:
            plain = None if batch.plain is None else resize(batch.plain, self.size)
            batch = replace(batch, image=resize(batch.image, self.size), plain=plain)
        return batch if self.max_length is None else cut_texts(batch, self.max_length, eos)


def resize(image_BCHW: Tensor, size: int) -> Tensor:
    """Resizes uint8 images with an antialiased bilinear filter."""
    if image_BCHW.shape[-1] == size:
        return image_BCHW
    smaller = F.interpolate(image_BCHW.float(), size=(size, size), mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(image_BCHW.dtype)


def cut_texts(batch: Batch, most: int, eos: int) -> Batch:
    """Cuts texts after `most` tokens. A text that is cut ends with </s>."""
    ids = batch.ids[:, :most]
    cut_B1 = batch.length[:, None] > most
    last_L = torch.arange(ids.shape[1], device=ids.device) == most - 1
    return replace(batch, ids=ids.masked_fill(cut_B1 & last_L, eos), length=batch.length.clamp(max=most))
