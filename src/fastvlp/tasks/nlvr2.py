"""Is a statement true of a pair of images? (NLVR2, Suhr et al. 2019; METER, arXiv 2111.02387; spec flm.md section 5; UNITER,
arXiv 1909.11740, section 4 and table 5)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch, Regions
from fastvlp.data.pairs import Fit
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import given
from fastvlp.model.single_stream import SingleConfig
from fastvlp.tasks.nlvr import NLVRData, Truth
from fastvlp.tasks.task import HeadConfig
from fastvlp.tasks.uniter_heads import PairAttention

Form = Literal["triplet", "pair", "pair-biattn"]


@dataclass(frozen=True, kw_only=True)
class NLVR2Data(NLVRData):
    """Records of two images; `batch_size` counts pairs."""

    fit: Fit = "crop"

    @property
    def images(self) -> int:
        return 2


@dataclass(frozen=True, kw_only=True)
class NLVR2Config(HeadConfig):
    """form: the statement is read beside each image, and the summaries are concatenated (pair) or each sequence attends to
    the other and both are pooled (pair-biattn); or it is read once beside the regions of both (triplet). Fusion models
    have the pair alone."""

    form: Form = "pair"

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> NLVR2:
        return NLVR2(self, model)


class NLVR2(Truth):
    """The first image has type 0, the second type 1."""

    def __init__(self, config: NLVR2Config, model: ModelConfig):
        width = model.text.width
        if config.form != "pair" and model.single is None:
            raise UserError(f"form {config.form} needs a single stream over text and regions; choose --form pair")
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
        """Pretraining shows one image: the second one's type starts as the first one's (spec flm.md section 5)."""
        if model.config.single is not None:
            model.single.kinds[2].copy_(model.single.kinds[1])
        else:
            model.fusion.image_type[1].copy_(model.fusion.image_type[0])

    def logits(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        if self.form == "pair":
            return super().logits(model, image_BKD, batch)
        ids, length, regions = batch.ids, batch.length, given(batch.regions)
        if self.form == "triplet":
            feature, regions, slot = side_by_side(image_BKD, regions)
            joint = model.read_regions(feature, regions, ids[::2], length[::2], slot_B=slot)
            return self.head(joint.pooled).float()
        joint = model.read_regions(image_BKD, regions, ids, length, slot_B=batch.slot)
        state_BSD = torch.cat([joint.text, joint.region], 1)
        word_BL = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
        real_BS = torch.cat([word_BL, regions.mask], 1)
        return self.head(state_BSD[::2], real_BS[::2], state_BSD[1::2], real_BS[1::2]).float()


def side_by_side(feature_BRF: Tensor, regions: Regions) -> tuple[Tensor, Regions, Tensor]:
    """Rows of a pair of images to one row of all their regions: features, regions, and the image that each is of."""
    feature, box = (x.unflatten(0, (-1, 2)).flatten(1, 2) for x in (feature_BRF, regions.box))
    slot = torch.arange(2, device=box.device).repeat_interleave(regions.box.shape[1]).expand(box.shape[:2])
    # Padding lies between: it has no area, by which it is told from regions.
    return feature, Regions(box=box, count=torch.full_like(regions.count[::2], box.shape[1])), slot
