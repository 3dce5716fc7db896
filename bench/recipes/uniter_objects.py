"""UNITER over objects' own pixels, as docs/log.md fine-tunes for NLVR: uniter_demo without a detector's features.

    vlp pretrain uniter_objects.py --steps 2500

Regions are the boxes of the embedded corpus, each shown as a crop of 8 x 8 pixels from an image of 128. Written down from the
log's description: the original file was not kept, so that numbers may differ in detail.
"""

from dataclasses import replace

from fastvlp.data.regions import RegionSource
from fastvlp.model.sizes import tiny_single
from fastvlp.recipes.uniter_demo import uniter_demo
from fastvlp.training.train_config import TrainConfig


def uniter_objects() -> TrainConfig:
    run = uniter_demo()
    objectives = {name: run.objectives[name] for name in ("itm", "mlm", "mrfr")}
    return replace(
        run,
        name="objects",
        data=replace(run.data, regions=RegionSource()),
        model=tiny_single(size=128, crop=8),
        objectives=objectives,
        mix={"itm": 6, "mlm": 8, "mrfr": 4},
        steps=2500,
        budget_s=None,
        precision="bf16",
    )
