"""Contrastive learning of images alone: two random views of each image find each other among all views (SimCLR, arXiv
2002.05709). Beside a contrastive loss of pairs it is SLIP (arXiv 2112.12750)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.config import Count, NotNegative
from fastvlp.data.augment import AugmentConfig, augment
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.joint_space import unit
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.contrastive import nt_xent
from fastvlp.objectives.objective import Loss, ObjectiveConfig, PairObjective, constant
from fastvlp.random import hash64_rows

VIEW_SALT = 901
VIEWS = (1, 2)  # 0 is what training shows the other objectives
NATURAL = AugmentConfig(
    crop=(0.08, 1.0), flip=0.5, jitter=0.8, strength=(0.8, 0.8, 0.8, 0.2), gray=0.2, blur=0.5, sigma=(0.1, 2.0)
)


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(ObjectiveConfig):
    """Find the other view of each image among two random views of all images."""

    augment: AugmentConfig = NATURAL
    """Random changes of an image that make a view of it; by default those of the paper, whose blur is meant for 224 pixels."""
    keep: float = 1.0
    """Share of a view's patches that are encoded; the patches are drawn for each view."""
    hidden: Count | None = None
    """Width of the projection's hidden layer; by default the width of the image encoder."""
    width: Count = 128
    """Dimension of a projected view."""
    temperature: float = 0.1
    """Temperature of the softmax; it is not learned."""
    weight: NotNegative = 1.0
    """Weight of the loss (SLIP: 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` is a share of the patches, above 0 and up to 1, not {self.keep}")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, not {self.temperature}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> SimCLR:
        if model.single is not None:
            raise UserError("SimCLR needs an image encoder over patches, but a single stream reads regions")
        if model.embed is not None and model.embed.reads_boxes:
            raise UserError(
                "views of SimCLR have no boxes, which the joint space reads; give `model.embed` a grid, or no regions"
            )
        return SimCLR(self, model.image.width)


class SimCLR(PairObjective):
    # Texts play no part in it.
    contrasts = False
    abilities = frozenset()
    image_use = "pixels"

    def __init__(self, config: SimCLRConfig, width: int):
        super().__init__()
        self.config = config
        hidden = config.hidden or width
        # Without the batch norms of the released code: the embedding of a row must not depend on its micro-batch.
        self.project = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, config.width))
        initialise(self, width)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"views": constant(2 * len(batch), batch.length)}

    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Unit vectors of both views, two [B E], encoded in one pass."""
        config, image = self.config, batch.image if batch.plain is None else batch.plain
        views = torch.cat([augment(image, batch.seed, config.augment, view=view)[0] for view in VIEWS])
        seeds = torch.cat([hash64_rows(batch.seed, VIEW_SALT, view) for view in VIEWS])
        keep_BK = model.config.image.random_patches(seeds, config.keep if self.drops_parts else 1.0, views)
        a_BE, b_BE = unit(self.project(summary(model, model.encode_image(views, keep_BK)))).chunk(2)
        return a_BE, b_BE

    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """The loss of each view among both views of the images of all ranks."""
        a_BE, b_BE = rows
        (all_a, first), (all_b, _) = self.gather_rows(a_BE), self.gather_rows(b_BE)
        own = first + torch.arange(len(a_BE), device=a_BE.device)
        loss = nt_xent(a_BE, b_BE, all_a, all_b, own, constant(1 / self.config.temperature, a_BE))
        return {"views": Loss(loss.sum(), constant(len(loss), own), self.config.weight)}


def summary(model: VLModel, state_BKD: Tensor) -> Tensor:
    """Returns the pooled state of an image that the joint space uses [B D]; without a joint space, the mean of its states."""
    if model.config.embed is None:
        return state_BKD.mean(1)
    return model.embed.image.summary(state_BKD)
