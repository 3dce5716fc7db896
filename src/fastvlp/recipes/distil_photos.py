"""CLIP that learns from a teacher too: its vectors (CLIP-KD, arXiv 2307.12732) and its similarities (MobileCLIP, 2311.17049).

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp convert openai/clip-vit-base-patch32 teacher        # or another, such as a run: --teacher RUN
    vlp pretrain distil_photos

The teacher's vectors of all images and captions are computed when the first run begins, and read from then on. Not measured
yet.
"""

from dataclasses import replace

from fastvlp.objectives.distil import FeatureDistilConfig, SimilarityDistilConfig
from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.train_config import TrainConfig


def distil_photos() -> TrainConfig:
    run = clip_photos()
    distil = {
        "features": FeatureDistilConfig(teacher="teacher"),
        "similarities": SimilarityDistilConfig(teacher="teacher"),
    }
    return replace(run, name="distil_photos", objectives={**run.objectives, **distil})
