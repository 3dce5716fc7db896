"""The decoder that two encoders without fusion layers get for tasks in which a text reads an image (FLIP, arXiv 2212.00794, A.6
and A.7)."""

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

# How much faster than the encoders the new layers learn: 1e-4 and 1e-5 in FLIP's appendix.
FASTER = 10


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """For two encoders without fusion layers: the layers in which a text reads the states of the image. FLIP has 3 over 3 image
    layers, 384 wide and with new words, for captions, and 4 over a text encoder for questions."""

    text: Literal["encoder", "new"] = "encoder"
    """What comes below them: the model's text encoder, or a table of new words alone."""
    layers: int = 4
    """Layers with self-attention over the text and cross-attention to the image."""
    image_layers: int = 0
    """Layers of self-attention over the image's states, before the text reads them."""
    width: int = 384
    """Numbers in a state where words are new; over a text encoder it is the encoder's."""
    dropout: float = 0.0
    """Share of each sublayer's outputs that is set to zero in training."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.image_layers < 0 or self.width < 1:
            raise UserError(
                f"`decoder`: at least 1 of `decoder.layers` ({self.layers}), 0 of `decoder.image_layers` "
                f"({self.image_layers}) and 1 of `decoder.width` ({self.width})"
            )


# Questions and other texts about an image; and captions, as in FLIP's appendix.
USUAL_DECODER = DecoderConfig()
CAPTION_DECODER = DecoderConfig(text="new", layers=3, image_layers=3)


def needs_decoder(config: ModelConfig) -> bool:
    """Whether the model is two encoders alone, in which no text reads an image."""
    return config.fusion is None and config.single is None


def with_decoder(pretrained: Pretrained, decoder: DecoderConfig, positions: int) -> Pretrained:
    """The pretrained encoders with a decoder of new weights, and without their joint space. A text encoder reads as it did for
    the joint space. `positions`: tokens that a text of new words may have. Raises UserError where the model has no text encoder
    to put it on."""
    config = pretrained.config
    if decoder.text == "new":
        layer = _layer(decoder.width, decoder.dropout)
        text = TextTransformerConfig(depth=0, layer=layer, positions=positions)
        return pretrained._replace(config=_fused(replace(config, text=text), decoder, layer), reading="full")
    if not config.text.present:
        raise UserError(f"{pretrained.folder}: it has no text encoder to put a decoder on; set `decoder.text` to new")
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
