"""Is a statement true of a pair of images? (NLVR2, Suhr et al. 2019; METER, arXiv 2111.02387; spec flm.md section 5)"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastvlp.data.rows import Fit
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.tasks.nlvr import NLVRData, Truth
from fastvlp.tasks.task import HeadConfig


@dataclass(frozen=True, kw_only=True)
class NLVR2Data(NLVRData):
    """Records of two images; `batch_size` counts pairs."""

    fit: Fit = "crop"

    @property
    def images(self) -> int:
        return 2


@dataclass(frozen=True, kw_only=True)
class NLVR2Config(HeadConfig):
    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> NLVR2:
        return NLVR2(self, model)


class NLVR2(Truth):
    """The statement is read twice, beside the first image (type 0) and the second (type 1); the two summaries are
    concatenated."""

    def __init__(self, config: NLVR2Config, model: ModelConfig):
        super().__init__(config, model, images=2)

    @torch.no_grad()
    def begin(self, model: VLModel) -> None:
        """Pretraining shows one image: the second one's type starts as the first one's (spec flm.md section 5)."""
        model.fusion.image_type[1].copy_(model.fusion.image_type[0])
