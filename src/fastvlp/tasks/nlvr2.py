"""Is a statement true of a pair of images? (NLVR2, Suhr et al., arXiv 1811.00491; METER, arXiv 2111.02387; UNITER, arXiv
1909.11740, section 4 and table 5)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch, Regions
from fastvlp.data.pairs import Split
from fastvlp.data.records.transform import Fit
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig, Reading, VLModel
from fastvlp.model.region_embedding import require_regions
from fastvlp.model.single_stream import SingleConfig
from fastvlp.tasks.heads import HeadConfig
from fastvlp.tasks.interface import FineTuned, Task
from fastvlp.tasks.nlvr import NLVRData, Truth, measure
from fastvlp.tasks.pretrained import Pretrained
from fastvlp.tasks.uniter_heads import PairAttention

Form = Literal["triplet", "pair", "pair-biattn"]


@dataclass(frozen=True, kw_only=True)
class NLVR2Data(NLVRData):
    """Records of two images; `batch_size` counts pairs."""

    fit: Fit = "crop"
    """How an image becomes a square."""

    @property
    def images(self) -> int:
        return 2


@dataclass(frozen=True, kw_only=True)
class NLVR2Config(HeadConfig):
    """A statement about a pair of images, true or false."""

    form: Form = "pair"
    """pair: the statement is read beside each image, and both summaries are concatenated. pair-biattn: each of the two
    sequences attends to the other, and both are pooled. triplet: the statement is read once, beside the regions of both.
    Fusion models have pair alone."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> NLVR2:
        return NLVR2(self, model)


class NLVR2(Truth):
    """Rows of the first image have slot 0, of the second slot 1."""

    def __init__(self, config: NLVR2Config, model: ModelConfig):
        width = model.text.width
        if config.form != "pair" and model.single is None:
            raise UserError(f"`form` {config.form} needs a single stream over text and regions; choose pair")
        head: nn.Module | None = None
        if model.single is not None:
            heads: dict[Form, Callable[[SingleConfig], nn.Module]] = {
                "triplet": lambda single: nn.Linear(width, 2),
                "pair": lambda single: nn.Linear(2 * width, 2),
                "pair-biattn": lambda single: PairAttention(single.layer),
            }
            head = heads[config.form](model.single)
        super().__init__(config, model, images=2, head=head)
        self.form = config.form

    @torch.no_grad()
    def begin(self, model: VLModel) -> None:
        """The second image's type starts as a copy of the first one's, since pretraining shows one image (METER)."""
        if model.config.single is not None:
            model.single.kinds[2].copy_(model.single.kinds[1])
        else:
            model.fusion.image_type[1].copy_(model.fusion.image_type[0])

    def logits(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        if self.form == "pair":
            return super().logits(model, image_BKD, batch)
        ids, length, regions = batch.ids, batch.length, require_regions(batch.regions)
        if self.form == "triplet":
            feature, regions, slot = side_by_side(image_BKD, regions)
            joint = model.read_regions(feature, regions, ids[::2], length[::2], slot_B=slot)
            logits: Tensor = self.head(joint.pooled)
            return logits.float()
        joint = model.read_regions(image_BKD, regions, ids, length, slot_B=batch.slot)
        state_BSD = torch.cat([joint.text, joint.region], 1)
        word_BL = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
        real_BS = torch.cat([word_BL, regions.mask], 1)
        logits = self.head(state_BSD[::2], real_BS[::2], state_BSD[1::2], real_BS[1::2])
        return logits.float()


def side_by_side(feature_BRF: Tensor, regions: Regions) -> tuple[Tensor, Regions, Tensor]:
    """Turns the two rows of a pair of images into one row with the regions of both: features, regions, and the image of each
    region."""
    feature, box = (x.reshape(-1, 2 * x.shape[1], x.shape[2]) for x in (feature_BRF, regions.box))
    slot = torch.arange(2, device=box.device).repeat_interleave(regions.box.shape[1]).expand(box.shape[:2])
    # Padding lies between the regions of both; it has no area, so that the mask leaves it out.
    return feature, Regions(box=box, count=torch.full_like(regions.count[::2], box.shape[1])), slot


@dataclass(frozen=True, kw_only=True)
class NLVR2Task(Task):
    """Decide whether a statement about a pair of images is true.

    The split pairs-train is read if there is one, and train otherwise. The other splits are found in the same way.
    """

    name = "nlvr2"
    data = NLVR2Data
    config = NLVR2Config
    field = "statements"
    answer = "label"
    token_types = 3
    # The embedded corpus has the data of pairs and of single images in one folder.
    split_prefixes = ("pairs-", "")

    form: Form | None = None
    """How a pair of images is read; by default pair-biattn on a single stream over regions, else pair."""

    def objective(self, data: NLVR2Data, pretrained: Pretrained, reading: Reading | None) -> NLVR2Config:
        usual: Form = "pair" if pretrained.config.single is None else "pair-biattn"
        return NLVR2Config(reading=reading or pretrained.reading, bos=pretrained.bos, form=self.form or usual)

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        return measure(tuned.saved.model, tuned.objective, tuned.items(split), tuned.data.batch_size)
