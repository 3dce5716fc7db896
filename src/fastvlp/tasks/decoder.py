"""The decoder that is added to two encoders without fusion layers, for tasks in which a text attends to an image (FLIP, arXiv
2212.00794, A.6 and A.7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fastvlp.errors import UserError
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.fusion import FusionConfig
from fastvlp.model.inherited_config import with_width
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig
from fastvlp.tasks.pretrained import Pretrained
from fastvlp.training.optim import OptimConfig

# Ratio of the learning rates of the new layers and the encoders: 1e-4 and 1e-5 in FLIP's appendix.
FASTER = 10


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Layers in which a text attends to the states of an image, for models of two encoders without fusion layers. For captions
    FLIP uses 3 such layers, 384 wide, with a new table of words and 3 image layers; for questions, 4 above a text encoder."""

    text: Literal["encoder", "new"] = "encoder"
    """Input of the layers: the states of the model's text encoder, or a new table of word embeddings."""
    layers: int = 4
    """Number of layers with self-attention over the text and cross-attention to the image."""
    image_layers: int = 0
    """Number of self-attention layers over the image's states, before the text attends to them."""
    width: int = 384
    """Width of the layers with a new table of words; above a text encoder it is the width of the encoder."""
    dropout: float = 0.0
    """Share of each sublayer's outputs that is set to zero in training."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.image_layers < 0 or self.width < 1:
            raise UserError(
                f"`decoder.layers` {self.layers} and `decoder.width` {self.width} must be at least 1, and "
                f"`decoder.image_layers` {self.image_layers} at least 0"
            )


# The decoder for questions and other texts about an image, and the decoder for captions, as in FLIP's appendix.
USUAL_DECODER = DecoderConfig()
CAPTION_DECODER = DecoderConfig(text="new", layers=3, image_layers=3)


def needs_decoder(config: ModelConfig) -> bool:
    """Whether the model consists of two separate encoders, so that no text attends to an image."""
    return config.fusion is None and config.single is None


def with_decoder(pretrained: Pretrained, decoder: DecoderConfig, positions: int) -> Pretrained:
    """Returns the pretrained encoders with a decoder of new weights, and without their joint space. The text encoder reads a
    text as it did for the joint space. `positions`: number of text positions, if the decoder has a new table of words. Raises
    UserError if the decoder needs a text encoder and the model has none."""
    config = pretrained.config
    if decoder.text == "new":
        layer = _layer(decoder.width, decoder.dropout)
        text = TextTransformerConfig(depth=0, layer=layer, positions=positions)
        return pretrained._replace(config=_fused(replace(config, text=text), decoder, layer), reading="full")
    if not config.text.present:
        raise UserError(
            f"{pretrained.folder}: it has no text encoder, which the decoder needs; set `decoder.text` to new"
        )
    causal = config.embed is not None and config.embed.text_mask == "causal"
    fused = _fused(config, decoder, _layer(config.text.width, decoder.dropout))
    return pretrained._replace(config=fused, reading="causal" if causal else "full")


def _fused(config: ModelConfig, decoder: DecoderConfig, layer: LayerConfig) -> ModelConfig:
    fusion = FusionConfig(depth=decoder.layers, image_depth=decoder.image_layers, layer=layer)
    return replace(config, fusion=fusion, embed=None)


def _layer(width: int, dropout: float) -> LayerConfig:
    """A layer with heads of 64 numbers at most, and an MLP four times as wide."""
    return with_width(LayerConfig(width=64, heads=1, hidden=256, dropout=dropout), width)


def slower_encoders(optim: OptimConfig, decoder: DecoderConfig) -> OptimConfig:
    """The same rates for all that is new, and a tenth for the encoders."""
    return replace(
        optim,
        lr=optim.lr / FASTER,
        cross_multiplier=FASTER * optim.cross_multiplier,
        head_multiplier=FASTER * optim.head_multiplier,
        parts={"text": FASTER} if decoder.text == "new" else {},
    )
