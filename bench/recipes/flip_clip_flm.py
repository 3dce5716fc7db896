"""Arm `flip_clip_flm` of the towers compared in docs/log.md: FLM and CLIP on half of each image's patches.

The towers are clip.py's, with one fusion layer and a reconstructor; the joint space is 256 wide.
"""

from dataclasses import replace

from clip import LAYER, clip

from fastvlp.model.fusion import FusionConfig, ReconstructorConfig
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.training.train_config import TrainConfig


def flip_clip_flm() -> TrainConfig:
    run = clip()
    assert run.model.embed is not None
    model = replace(
        run.model,
        fusion=FusionConfig(depth=1, layer=LAYER),
        reconstructor=ReconstructorConfig(bottom=2, top=1, layer=LAYER),
        embed=replace(run.model.embed, width=256),
    )
    objectives = {"flm": FLMConfig(), "clip": CLIPConfig()}
    return replace(run, name="flip_clip_flm", keep=0.5, model=model, objectives=objectives)
