"""FLM on the map of a frozen CNN with public weights, with the text layers of flm_photos from scratch:

R=bench/recipes
vlp compare $R/photo_flm.py $R/photo_mlm.py $R/photo_ar.py $R/photo_ar_minilm.py --budget 150s
"""

from dataclasses import replace

from public_encoders import lite0_images

from fastvlp.model.inherited_config import with_image
from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.train_config import TrainConfig


def photo_flm() -> TrainConfig:
    run = flm_photos()
    data = replace(run.data, train="flickr8k/train", val="flickr8k/val", fit="squash", group=2048)
    return replace(
        run,
        name="photo_flm",
        data=data,
        model=with_image(run.model, lite0_images()),
        freeze=("image",),
        budget_s=150,
        validate_every=None,
        checkpoint_every=None,
    )
