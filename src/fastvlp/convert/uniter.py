"""UNITER (arXiv 1909.11740) as released (ChenRocks/UNITER 1dbfa62): `model.*` and the heads that pretraining alone needs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastvlp.config import to_json
from fastvlp.convert.bert_layers import bert_layer
from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.published_shapes import BERT, activation_of, head_counts
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers, weight_and_bias
from fastvlp.data.regions import RegionSource
from fastvlp.errors import UserError
from fastvlp.model import sizes
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.region import MRCConfig, MRFRConfig
from fastvlp.objectives.wra import WRAConfig

# As many regions as the released extraction kept; a crop would leave some out.
DATA = {
    "regions": to_json(RegionSource(stored=True, most=100)),
    "max_length": 62,
    "fit": "squash",
    "captions": "captions",
}
# Second copies in the file of tensors that are one here: the word table, and the image projection.
TIED = {
    "cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
    "feat_regress.weight": "uniter.img_embeddings.img_linear.weight",
}
# The objectives' own parameters, by objective.
HEADS = {
    "mrfr": weight_and_bias("transform.0", "feat_regress.net.0")
    | weight_and_bias("transform.2", "feat_regress.net.2")
    | {"bias": ("feat_regress.bias",)},
    "mrc": weight_and_bias("transform.0", "region_classifier.net.0")
    | weight_and_bias("transform.2", "region_classifier.net.2")
    | weight_and_bias("classify", "region_classifier.net.3"),
}
# What pretraining adds to the encoder, and fine-tuned files lack.
WORD_AND_MATCH = {
    **weight_and_bias("single.words.transform", "cls.predictions.transform.dense"),
    **weight_and_bias("single.words.norm", "cls.predictions.transform.LayerNorm"),
    "single.words.bias": ("cls.predictions.bias",),
    **weight_and_bias("single.match", "itm_output"),
}


def uniter_encoder(depth: int) -> dict[str, tuple[str, ...]]:
    """Our parameters of the encoder -> theirs."""
    words, boxes = "uniter.embeddings", "uniter.img_embeddings"
    sources = {
        "text.word.weight": (f"{words}.word_embeddings.weight",),
        "text.position.weight": (f"{words}.position_embeddings.weight",),
        "single.kinds": (f"{words}.token_type_embeddings.weight",),
        "single.regions.mask": (f"{boxes}.mask_embedding.weight",),
        **weight_and_bias("text.norm", f"{words}.LayerNorm"),
        **weight_and_bias("single.regions.feature", f"{boxes}.img_linear"),
        **weight_and_bias("single.regions.feature_norm", f"{boxes}.img_layer_norm"),
        **weight_and_bias("single.regions.box", f"{boxes}.pos_linear"),
        **weight_and_bias("single.regions.box_norm", f"{boxes}.pos_layer_norm"),
        **weight_and_bias("single.regions.norm", f"{boxes}.LayerNorm"),
        **weight_and_bias("single.pool", "uniter.pooler.dense"),
    }
    for i in range(depth):
        sources |= bert_layer(f"single.blocks.{i}", f"uniter.encoder.layer.{i}", attend=True, cross=False)
    return sources


def from_uniter(
    weights: Weights, depth: int, *, pretrained: bool = True, heads: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The model's state dict from a checkpoint of the released code.

    Args:
        depth: layers of the encoder.
        pretrained: whether the file has the heads of words and matching, and no others but `uniter_heads`.
        heads: prefixes of a fine-tuned model's own heads, which are left out.

    Raises UserError if a tensor is missing or left over, or where a second copy differs from the first.
    """
    own = {name: value for name, value in weights.items() if name not in TIED}
    for copy, original in TIED.items():
        if copy in weights and not torch.equal(weights[copy], weights[original]):
            raise UserError(f"these weights are not laid out as UNITER: {copy} is not a copy of {original}")
    mask = "uniter.img_embeddings.mask_embedding.weight"
    if mask in own:
        # Row 0 stands for regions that are not masked, and is zeroed whenever it is read.
        own[mask] = own[mask][1]
    if pretrained:
        heads = (*heads, *(name for sources in HEADS.values() for (name,) in sources.values()))
    sources = uniter_encoder(depth) | (WORD_AND_MATCH if pretrained else {})
    return apply_map(own, WeightMap(sources=sources, unused=heads), layout="UNITER")


def uniter_heads(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """State dicts of the objectives `mrfr` and `mrc` from a pretrained checkpoint."""
    return {name: {ours: weights[theirs] for ours, (theirs,) in sources.items()} for name, sources in HEADS.items()}


def uniter_config(source: Checkpoint, stated: Stated, prefix: str) -> ModelConfig:
    """The model of UNITER's or BERT's tensors, whose names begin with `prefix`."""
    weights, settings = source.weights, source.settings
    words = weights[f"{prefix}embeddings.word_embeddings.weight"]
    width, depth = words.shape[1], len(layer_numbers(weights, f"{prefix}encoder.layer."))
    known = settings.get("num_attention_heads") or BERT.get((width, depth))
    (heads,) = head_counts(stated, {"the layers": known})
    regions = weights.get(f"{prefix}img_embeddings.img_linear.weight")
    config = sizes.uniter(width=width, depth=depth, feature=2048 if regions is None else regions.shape[1])
    image, text = config.image, config.text
    assert config.single is not None and isinstance(image, ViTConfig) and isinstance(text, TextTransformerConfig)
    layer = replace(
        config.single.layer,
        heads=heads,
        hidden=len(weights[f"{prefix}encoder.layer.0.intermediate.dense.weight"]),
        activation=activation_of(settings.get("hidden_act", "gelu"), stated),
    )
    positions = len(weights[f"{prefix}embeddings.position_embeddings.weight"])
    types = len(weights[f"{prefix}embeddings.token_type_embeddings.weight"])
    return replace(
        config,
        image=replace(image, layer=layer),
        text=replace(text, layer=layer, positions=positions),
        single=replace(config.single, layer=layer, types=types),
    )


class UNITERLayout(Layout):
    name = "uniter"
    summary = "UNITER as pretrained by its code"
    options = ("heads",)

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        return "uniter.embeddings.word_embeddings.weight" in source.names

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        weights = source.weights
        config, heads = uniter_config(source, stated, "uniter."), uniter_heads(weights)
        assert config.single is not None
        objective_weights = {
            f"{name}.{key}": x for name, head in (("mrfr", "mrfr"), ("mrc_kl", "mrc")) for key, x in heads[head].items()
        }
        return Release(
            config=config,
            weights=from_uniter(weights, config.single.depth),
            data=DATA,
            objectives={
                "itm": WRAConfig(),
                "mlm": MLMConfig(mask_rate=0.15, whole_word=False),
                "mrfr": MRFRConfig(),
                "mrc_kl": MRCConfig(classes=heads["mrc"]["classify.bias"].shape[0]),
            },
            objective_weights=objective_weights,
        )
