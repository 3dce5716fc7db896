"""A head on the model's summary of a text beside an image. Most tasks train one."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch, Regions
from fastvlp.errors import UserError
from fastvlp.model.layers import initialise
from fastvlp.model.model import Bos, ModelConfig, Reading, VLModel
from fastvlp.objectives.objective import Objective, ObjectiveConfig
from fastvlp.tasks.uniter_heads import answer_head


@dataclass(frozen=True, kw_only=True)
class HeadConfig(ObjectiveConfig, abc.ABC):
    """The config of an objective that reads a text beside an image."""

    reading: Reading
    """How the model reads the text: usually as it did in pretraining."""
    bos: Bos = "blind"
    """The tokens that `<s>` attended to in pretraining."""


class HeadObjective(Objective, abc.ABC):
    """A head on the summaries of all rows of an item together.

    Fusion models: a pooler (Linear, tanh) on the summary of each image beside the text, then Linear, LayerNorm, GELU,
    Linear: the heads of VQA (768-1536-A) and NLVR2 (1536-1536-2) in METER (arXiv 2111.02387) and FLM (arXiv 2303.14038).
    Every reading gives a summary of the model's width, so a model with one stream over the text takes the same heads. A
    single stream over text and regions has a pooler of its own; its head is Linear, GELU, LayerNorm, Linear (UNITER, arXiv
    1909.11740).

    Args:
        images: number of images of an item.
        outputs: number of logits of an item.
        head: a head to use instead, from the summaries of an item [items images*D] to its logits.
    """

    bos: Bos

    def __init__(
        self, config: HeadConfig, model: ModelConfig, *, images: int, outputs: int, head: nn.Module | None = None
    ):
        super().__init__()
        check_reading(config.reading, model, images)
        width = model.text.width
        self.reading, self.bos, self.images = config.reading, config.bos, images
        self.pool = nn.Linear(width, width) if model.single is None else None
        if head is None and model.single is not None:
            head = answer_head(width, outputs)
        self.head = head or nn.Sequential(
            nn.Linear(images * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs)
        )
        initialise(self, width)

    def pooled(
        self,
        model: VLModel,
        image_BKD: Tensor,
        ids_BL: Tensor,
        length_B: Tensor,
        regions: Regions | None,
        slot_B: Tensor | None = None,
    ) -> Tensor:
        """Returns the summary of each row -> [B D]."""
        if self.pool is None:
            return model.read_regions(image_BKD, regions, ids_BL, length_B, slot_B=slot_B).pooled
        summary = model.summarise(image_BKD, ids_BL, length_B, reading=self.reading, slot_B=slot_B, bos=self.bos)
        return torch.tanh(self.pool(summary))

    def logits(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        """Returns the logits of the items -> [items outputs]; an item has `images` consecutive rows of the batch."""
        pooled = self.pooled(model, image_BKD, batch.ids, batch.length, batch.regions, batch.slot)
        logits: Tensor = self.head(pooled.reshape(-1, self.images * pooled.shape[1]))
        return logits.float()


def check_reading(reading: Reading, model: ModelConfig, images: int = 1) -> None:
    """Raises UserError if the model cannot read a text beside this number of images in this way."""
    if model.single is not None:
        if reading != "full":
            raise UserError(
                f"a single stream over text and regions has the full `reading` alone, not {reading}; leave it out"
            )
        if model.single.types <= images:
            raise UserError(
                f"the model has token types for {model.single.types - 1} image at most, and the task shows {images}; set "
                f"`model.single.types` to {images + 1}"
            )
        return
    if reading == "flm" and model.reconstructor is None:
        raise UserError("the flm `reading` needs a model with a reconstructor; choose full or causal")
    if model.fusion is None:
        raise UserError(
            "the task reads text and image together, but the model has two separate encoders without fusion layers"
        )
    if model.fusion.slots < images:
        raise UserError(
            f"the model reads at most {model.fusion.slots} image per text, and the task shows {images}; set "
            f"`model.fusion.slots` to {images}"
        )


def target_of(batch: Batch) -> Tensor:
    """Returns the targets of a batch's items, one row for each item. Raises ValueError for a batch without targets."""
    if batch.target is None:
        raise ValueError("a batch without targets; tasks take the batches of an ItemMaker")
    return batch.target


def image_states(model: VLModel, batch: Batch) -> Tensor:
    """Returns the states of the batch's images, with their regions -> [B K D]."""
    return model.encode_image(batch.image, regions=batch.regions)
