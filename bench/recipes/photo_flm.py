"""FLM on the map of a frozen CNN and with a text encoder of six layers, both with public weights:

R=bench/recipes
vlp compare $R/photo_flm.py $R/photo_mlm.py $R/photo_ar.py --budget 4m --set data.test=flickr8k/test
"""

from dataclasses import replace

from public_encoders import lite0_images, minilm

from fastvlp.model.inherited_config import with_image
from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def photo_flm() -> TrainConfig:
    run = flm_photos()
    data = replace(run.data, train="flickr8k/train", val="flickr8k/val", max_length=40, fit="squash", group=2048)
    return replace(
        run,
        name="photo_flm",
        data=data,
        model=with_image(run.model, lite0_images()),
        # The layers that join the encoders are new: they learn at five times the rate of the text encoder.
        optim=OptimConfig(lr=1.5e-4, weight_decay=0.05, cross_multiplier=5, head_multiplier=5),
        text=minilm(),
        freeze=("image",),
        budget_s=240,
        validate_every=None,
        checkpoint_every=None,
    )
