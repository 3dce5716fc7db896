"""Free language modeling and a contrastive loss in one model, which encodes half of each image's patches.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain flip_clip_flm

The model can embed images and texts, and write and answer after fine-tuning. With a smaller model and in nine minutes of one
CPU core: 5.1 % retrieval recall, where clip_photos had 6.4 %, and 45.4 % of the cloze words (docs/log.md, entry 13).
"""

from dataclasses import replace

from fastvlp.model.sizes import joint_space
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.train_config import TrainConfig


def flip_clip_flm() -> TrainConfig:
    run = flm_photos()
    model = replace(run.model, embed=joint_space(run.model))
    objectives = {**run.objectives, "clip": CLIPConfig()}
    return replace(run, name="flip_clip_flm", keep=0.5, model=model, objectives=objectives)
