"""uniter_demo with masked box regression, whose states keep where regions are (docs/log.md, entry 27).

vlp pretrain uniter_boxes.py
"""

from dataclasses import replace

from fastvlp.objectives.boxes import BoxesConfig
from fastvlp.recipes.uniter_demo import uniter_demo
from fastvlp.training.train_config import TrainConfig


def uniter_boxes() -> TrainConfig:
    run = uniter_demo()
    objectives = {**run.objectives, "boxes": BoxesConfig()}
    return replace(run, name="uniter_boxes", objectives=objectives, mix={**(run.mix or {}), "boxes": 4})
