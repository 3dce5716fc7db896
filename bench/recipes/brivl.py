"""Arm `brivl` of the towers compared in docs/log.md: BriVL's heads over a 6x6 grid and a queue of 2,048 keys.

The last of clip.py's two text layers is the one in BriVL's head.
"""

from dataclasses import replace

from clip import LAYER, clip

from fastvlp.model.sizes import region_heads
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.train_config import TrainConfig


def brivl() -> TrainConfig:
    run = clip()
    layer = replace(LAYER, hidden=256, norm="post", activation="relu")
    model = replace(
        run.model,
        text=replace(run.model.text, depth=1),
        embed=region_heads(run.model, width=128, layer=layer, depth=1, grid=6),
    )
    return replace(run, name="brivl", model=model, objectives={"moco": MoCoConfig(queue=2048, warm=True)})
