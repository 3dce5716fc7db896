"""Masked box regression: predicts the box of each region from the words, the features, and the boxes that are not hidden.

This objective is our own; the bounding-box prediction of X-VLM (arXiv 2111.08276, section 3.2) is similar. UNITER's objectives
seldom need the position of a region. A model therefore learns to ignore boxes, and fine-tuning cannot undo this. With this
objective the states have to keep the boxes that are shown, and words such as "left of" help to predict those that are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch, Regions
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import MEAN_BOX, random_hide, require_regions
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig
from fastvlp.objectives.region import single_config

HIDE_SALT = 641


@dataclass(frozen=True, kw_only=True)
class BoxesConfig(ObjectiveConfig):
    """Predict the box of each region, while some of the boxes are hidden."""

    rate: float = 0.3
    """Share of the boxes that are hidden; at least one box of each image."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"`rate` is a share above 0, not {self.rate}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Boxes:
        return Boxes(self, model)


class Boxes(Objective):
    """The distance of the predicted edges of all boxes, as fractions of the image."""

    def __init__(self, config: BoxesConfig, model: ModelConfig):
        super().__init__()
        layer = single_config(model).layer
        self.config = config
        self.predict = nn.Sequential(
            nn.Linear(layer.width, layer.width),
            nn.GELU(),
            nn.LayerNorm(layer.width, eps=layer.eps),
            nn.Linear(layer.width, 4),
        )
        initialise(self, layer.width)

    def hidden(self, batch: Batch) -> Regions:
        """Returns the regions with some boxes replaced by the mean box, which gives the model no information."""
        regions = require_regions(batch.regions)
        hidden_BR = random_hide(batch.seed, regions.mask, self.config.rate, salt=HIDE_SALT)
        return replace(regions, box=torch.where(hidden_BR[..., None], regions.box.new_tensor(MEAN_BOX), regions.box))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"edges": require_regions(batch.regions).mask.sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """The sum of the absolute errors of a box's four edges."""
        regions = require_regions(batch.regions)
        joint = model.read_regions(image_BKD, self.hidden(batch), batch.ids, batch.length)
        predicted_T4 = at_least_fp32(self.predict(joint.region[regions.mask]))
        error_T = (predicted_T4 - regions.box[regions.mask].to(predicted_T4.dtype)).abs().sum(1)
        return {"edges": Loss(error_T.sum(), self.counts(batch)["edges"])}
