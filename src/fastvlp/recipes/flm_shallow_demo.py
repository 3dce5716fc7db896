"""Free language modeling with a shallow decoder on the embedded corpus: flm_demo with one layer of fusion in place of two,
and a reconstructor of one layer in place of three, which reads the states after fusion.

    vlp data demo --level easy
    vlp pretrain flm_shallow_demo --data.train demo/easy/train --data.val demo/easy/val --model.image.patch 24

A step takes about two thirds of flm_demo's. Beside it, MLM and AR at equal time: docs/log.md, entry 46.
"""

from dataclasses import replace

from fastvlp.recipes.flm_demo import flm_demo
from fastvlp.training.train_config import TrainConfig


def flm_shallow_demo() -> TrainConfig:
    run = flm_demo()
    model = run.model
    assert model.fusion is not None and model.reconstructor is not None
    fusion, reconstructor = replace(model.fusion, depth=1), replace(model.reconstructor, bottom=0, top=1)
    return replace(run, name="flm_shallow_demo", model=replace(model, fusion=fusion, reconstructor=reconstructor))
