"""Chinese captions: a text encoder of four layers from scratch beside a frozen CNN with public weights."""

from dataclasses import replace

from photo_heads import photo_heads

from fastvlp.model.sizes import clip_small
from fastvlp.training.train_config import TrainConfig


def photo_zh() -> TrainConfig:
    run = photo_heads()
    text = clip_small().embed.text
    return replace(
        run,
        name="photo_zh",
        data=replace(run.data, captions="captions_zh"),
        model=replace(run.model, embed=replace(run.model.embed, text=text, text_mask="causal")),
        text=None,
        freeze=("image",),
        vocab=5000,
        # Nine epochs.
        steps=104,
        validate_every=None,
    )
