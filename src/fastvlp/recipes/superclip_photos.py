"""SuperCLIP (arXiv 2512.14480) on your own image-text pairs: clip_photos, and the image predicts the words of its caption.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain superclip_photos

Negative so far: with smaller towers, four minutes of a CPU core and 6,000 photographs, a recall of 2.4 ± 0.1 %
(clip_photos 2.9 ± 0.1 %; docs/log.md, entry 56).
"""

from dataclasses import replace

from fastvlp.objectives.superclip import SuperCLIPConfig
from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.train_config import TrainConfig


def superclip_photos() -> TrainConfig:
    run = clip_photos()
    return replace(run, name="superclip_photos", objectives={**run.objectives, "superclip": SuperCLIPConfig()})
