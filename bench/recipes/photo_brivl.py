"""BriVL's heads and queue on a frozen CNN and a frozen text encoder with public weights: photo_heads with a 6x6 grid of regions
of the CNN's map, a layer of self-attention in each head, and negatives from a queue in place of the batch."""

from dataclasses import replace

from photo_heads import photo_heads
from public_encoders import lite0_images

from fastvlp.model.layers import LayerConfig
from fastvlp.model.sizes import region_heads
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.train_config import TrainConfig


def photo_brivl() -> TrainConfig:
    run = photo_heads()
    layer = LayerConfig(width=384, heads=6, hidden=768, norm="post", activation="relu", dropout=0.1)
    embed = replace(region_heads(run.model, width=384, layer=layer, depth=1, grid=6), text_mask="full")
    return replace(
        run,
        name="photo_brivl",
        data=replace(run.data, batch_size=128),
        model=replace(run.model, image=lite0_images(), embed=embed),
        objectives={"moco": MoCoConfig(queue=4096, warm=True)},
        optim=replace(run.optim, lr=5e-4),
        # Two epochs, in about the CPU time of twenty without a queue.
        steps=105,
        validate_every=None,
    )
