"""An image or a text encoder alone, in the layout of transformers: ViT, DeiT, DINOv2 and CNNs; BERT, RoBERTa and their like."""

from __future__ import annotations

from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.encoder_family import ImageFamily, TextFamily, TextReading
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.public_encoders import find_family, read_images, read_texts
from fastvlp.convert.public_model import public_weights
from fastvlp.convert.two_encoders import has_parts, joined, tokens_read
from fastvlp.errors import UserError
from fastvlp.model.encoders.absent_encoders import AbsentImagesConfig, AbsentTextsConfig
from fastvlp.model.encoders.transformers_models import transformers
from fastvlp.model.joint_space import HeadConfig

# Tokens of a text where an image encoder comes without a text encoder.
POSITIONS = 64


def _mapped(name: str, tasks: str) -> bool:
    """Whether transformers, where it is installed, has models of a type for tasks."""
    try:
        auto = transformers().models.auto.modeling_auto
    except UserError:
        return False
    return name in getattr(auto, tasks)


class ImageEncoderLayout(Layout):
    name = "image_encoder"
    summary = "an image encoder of transformers, such as vit, deit, dinov2, convnext"

    @classmethod
    def described(cls, source: Checkpoint) -> bool:
        if source.model_type is None or has_parts(source):
            return False
        family = find_family(ImageFamily, source.settings)
        return family is not None or _mapped(source.model_type, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        images = read_images(source)
        width = images.config.width
        # The joint space says how a run that adds a text encoder reads both, until it is trained.
        reading = TextReading(head=HeadConfig(pool="mean"), mask="full")
        text = AbsentTextsConfig(positions=POSITIONS, width=width)
        config = joined(images.config, text, images.head, reading, width)
        return Release(
            config=config,
            weights={name: x for name, x in public_weights(config, images, None).items() if name.startswith("image.")},
            data={"max_length": POSITIONS, "fit": images.preprocessing.fit, "captions": "captions"},
            untrained=("embed.",),
        )


class TextEncoderLayout(Layout):
    name = "text_encoder"
    summary = "a text encoder of transformers, such as bert, roberta, xlm-roberta, electra"

    @classmethod
    def described(cls, source: Checkpoint) -> bool:
        if source.model_type is None or has_parts(source):
            return False
        family = find_family(TextFamily, source.settings)
        return family is not None or _mapped(source.model_type, "MODEL_FOR_MASKED_LM_MAPPING_NAMES")

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        texts = read_texts(source)
        width = texts.config.width
        image = AbsentImagesConfig(size=224, width=width)
        config = joined(image, texts.config, HeadConfig(pool="mean"), texts.reading, width)
        return Release(
            config=config,
            weights={name: x for name, x in public_weights(config, None, texts).items() if name.startswith("text.")},
            untrained=("embed.",),
            data={"max_length": config.longest_text, "fit": "crop", "captions": "captions"},
            needs=tokens_read(texts),
        )
