"""Distillation: a student learns from a teacher's vectors of the same images and texts, which were computed once and stored.

The teacher is the folder of a run, an export, or a public model that `vlp convert` made one of ours.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.config import NotNegative, Positive
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.joint_space import unit
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import read_config, read_objectives
from fastvlp.objectives.contrastive import clamp_log_scale
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig, PairObjective, constant


def squared_distance(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Squared distance of each row's unit vectors [B] (CLIP-KD, arXiv 2307.12732, section 3.2: feature distillation)."""
    return (at_least_fp32(student_BE) - at_least_fp32(teacher_BE)).square().sum(1)


def similarity_divergence(
    query_BE: Tensor,
    key_ME: Tensor,
    teacher_query_BE: Tensor,
    teacher_key_ME: Tensor,
    scale: Tensor,
    teacher_scale: float,
) -> Tensor:
    """Kullback-Leibler divergence of the student's softmax over all keys from the teacher's, of each row [B] (MobileCLIP,
    arXiv 2311.17049, section 3.2)."""
    student_BM = F.log_softmax(at_least_fp32(query_BE) @ at_least_fp32(key_ME).T * scale, 1)
    teacher_BM = F.log_softmax(at_least_fp32(teacher_query_BE) @ at_least_fp32(teacher_key_ME).T * teacher_scale, 1)
    return F.kl_div(student_BM, teacher_BM, reduction="none", log_target=True).sum(1)


@dataclass(frozen=True, kw_only=True)
class DistilConfig(ObjectiveConfig, abc.ABC):
    """Options of all objectives that distil from a teacher."""

    teacher: str
    """Folder of the teacher: a run, an export, or a converted public model."""

    def with_teacher(self, folder: str) -> DistilConfig:
        return replace(self, teacher=folder)

    def teacher_width(self, model: ModelConfig) -> int:
        """Numbers in a vector of the teacher. Raises UserError if teacher or student have no joint space."""
        teacher = read_config(self.teacher)
        for name, config in ((self.teacher, teacher), ("the student", model)):
            if config.embed is None:
                raise UserError(f"{name}: distillation needs a joint space of images and texts; set `model.embed`")
        assert teacher.embed is not None
        return teacher.embed.width


@dataclass(frozen=True, kw_only=True)
class FeatureDistilConfig(DistilConfig):
    """Bring the vectors of images and texts close to the teacher's (CLIP-KD, arXiv 2307.12732, section 3.2)."""

    weight: NotNegative = 4.0
    """Weight of the squared distance. CLIP-KD uses 2,000 for the mean over 512 dimensions, which is about 4 for the sum."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> FeatureDistil:
        return FeatureDistil(self, model, self.teacher_width(model))


@dataclass(frozen=True, kw_only=True)
class SimilarityDistilConfig(DistilConfig):
    """Match the teacher's similarities between all images and texts of a step (MobileCLIP, arXiv 2311.17049, section 3.2)."""

    weight: NotNegative = 1.0
    """Weight of the divergence, relative to the contrastive loss (MobileCLIP: from 0.7 with 0.3 for the contrastive loss, to 1
    without it)."""
    temperature: Positive = 0.07
    """The student's initial temperature; it is learned."""
    teacher_temperature: Positive | None = None
    """The teacher's temperature; None: the temperature that the teacher learned, or 0.01 if it has none."""
    max_scale: Positive = 100.0
    """Largest inverse of the student's temperature."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> SimilarityDistil:
        self.teacher_width(model)
        return SimilarityDistil(self)


def teacher_vectors(batch: Batch) -> tuple[Tensor, Tensor]:
    """The teacher's vectors of images and texts, two [B E]."""
    if batch.teacher_image is None or batch.teacher_text is None:
        raise UserError(
            "distillation needs a teacher's vectors of image-text pairs, which these data (`data`) do not have"
        )
    return batch.teacher_image, batch.teacher_text


def student_vectors(model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The student's unit vectors of whole images and texts, two [B E]."""
    text_BE = model.embed_text(batch.ids, batch.length, stored_BSD=batch.text)
    return model.embed_image(image_BKD, batch.regions), text_BE


class FeatureDistil(Objective):
    """Where the joint spaces differ in width, a learned matrix maps the student's vectors to the teacher's space."""

    image_use = "embedding"
    text_use = "embedding"

    def __init__(self, config: FeatureDistilConfig, model: ModelConfig, width: int):
        super().__init__()
        assert model.embed is not None
        self.config, self.teacher, own = config, config.teacher, model.embed.width
        same = own == width
        self.image = nn.Identity() if same else nn.Linear(own, width, bias=False)
        self.text = nn.Identity() if same else nn.Linear(own, width, bias=False)
        initialise(self, own)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(("image", "text"), constant(len(batch), batch.length))

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        own = student_vectors(model, image_BKD, batch)
        parts = zip(("image", "text"), (self.image, self.text), own, teacher_vectors(batch), strict=True)
        return {
            name: Loss(squared_distance(unit(project(x)), y).sum(), self.counts(batch)[name], self.config.weight)
            for name, project, x, y in parts
        }

    def kept(self) -> dict[str, Tensor]:
        return {}


class SimilarityDistil(PairObjective):
    image_use = "embedding"
    text_use = "embedding"
    # No pair is wrong for another: the teacher says how alike they are.
    contrasts = False

    def __init__(self, config: SimilarityDistilConfig):
        super().__init__()
        self.config, self.teacher = config, config.teacher
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        given = config.teacher_temperature
        self.teacher_scale = learned_scale(config.teacher) if given is None else 1 / given

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(("image", "text"), constant(len(batch), batch.length))

    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return student_vectors(model, image_BKD, batch)

    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        return teacher_vectors(batch)

    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """Divergences of each image over the texts of all ranks, and of each text over the images."""
        image_BE, text_BE, teacher_image_BE, teacher_text_BE = rows
        images, texts, teacher_images, teacher_texts = (self.gather_rows(x)[0] for x in rows)
        scales = self.log_scale.exp(), self.teacher_scale
        losses = {
            "image": similarity_divergence(image_BE, texts, teacher_image_BE, teacher_texts, *scales),
            "text": similarity_divergence(text_BE, images, teacher_text_BE, teacher_images, *scales),
        }
        count = torch.full((), len(image_BE), device=image_BE.device)
        return {name: Loss(loss_B.sum(), count, self.config.weight / 2) for name, loss_B in losses.items()}

    def after_step(self, model: VLModel) -> None:
        clamp_log_scale(self.log_scale, self.config.max_scale)


def learned_scale(folder: str) -> float:
    """The inverse temperature that a teacher learned; CLIP's bound where it kept none."""
    for name, x in read_objectives(folder).items():
        if name.endswith("log_scale"):
            return float(x.exp())
    return 100.0
