"""Weights of the released UNITER (ChenRocks/UNITER 1dbfa62): `model.*` and the heads that pretraining alone needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastvlp.convert.flm import WeightMap, _bert_layer, _both, apply_map
from fastvlp.errors import UserError

# Second copies in the file of tensors that are one here: the word table, and the image projection.
TIED = {
    "cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
    "feat_regress.weight": "uniter.img_embeddings.img_linear.weight",
}
# The objectives' own parameters, by objective.
HEADS = {
    "mrfr": _both("transform.0", "feat_regress.net.0")
    | _both("transform.2", "feat_regress.net.2")
    | {"bias": ("feat_regress.bias",)},
    "mrc": _both("transform.0", "region_classifier.net.0")
    | _both("transform.2", "region_classifier.net.2")
    | _both("classify", "region_classifier.net.3"),
}


def uniter_map(depth: int) -> dict[str, tuple[str, ...]]:
    """Our parameters of the encoder -> theirs."""
    words, boxes = "uniter.embeddings", "uniter.img_embeddings"
    made = {
        "text.word.weight": (f"{words}.word_embeddings.weight",),
        "text.position.weight": (f"{words}.position_embeddings.weight",),
        "single.kinds": (f"{words}.token_type_embeddings.weight",),
        "single.regions.mask": (f"{boxes}.mask_embedding.weight",),
        **_both("text.norm", f"{words}.LayerNorm"),
        **_both("single.regions.feature", f"{boxes}.img_linear"),
        **_both("single.regions.feature_norm", f"{boxes}.img_layer_norm"),
        **_both("single.regions.box", f"{boxes}.pos_linear"),
        **_both("single.regions.box_norm", f"{boxes}.pos_layer_norm"),
        **_both("single.regions.norm", f"{boxes}.LayerNorm"),
        **_both("single.pool", "uniter.pooler.dense"),
    }
    for i in range(depth):
        made |= _bert_layer(f"single.blocks.{i}", f"uniter.encoder.layer.{i}", attend=True, cross=False)
    return made


# What pretraining adds to the encoder, and fine-tuned files lack.
WORD_AND_MATCH = {
    **_both("single.words.transform", "cls.predictions.transform.dense"),
    **_both("single.words.norm", "cls.predictions.transform.LayerNorm"),
    "single.words.bias": ("cls.predictions.bias",),
    **_both("single.match", "itm_output"),
}


def from_uniter(
    weights: Mapping[str, Tensor], depth: int, *, pretrained: bool = True, heads: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The model's state dict from a checkpoint of the released code. pretrained: with the word and matching heads, and
    nothing but `uniter_heads` besides; otherwise the encoder alone. heads: prefixes of a fine-tuned model's own.

    Raises UserError where a tensor is missing or left over, or a second copy differs from the first.
    """
    told = {name: value for name, value in weights.items() if name not in TIED}
    for copy, own in TIED.items():
        if copy in weights and not torch.equal(weights[copy], weights[own]):
            raise UserError(f"these weights are not laid out as UNITER: {copy} is not a copy of {own}")
    mask = "uniter.img_embeddings.mask_embedding.weight"
    if mask in told:
        # Row 0 stands for regions that are not masked, and is zeroed whenever it is read.
        told[mask] = told[mask][1]
    if pretrained:
        heads = (*heads, *(name for made in HEADS.values() for (name,) in made.values()))
    made = uniter_map(depth) | (WORD_AND_MATCH if pretrained else {})
    return apply_map(told, WeightMap(made=made, unused=heads), source="UNITER")


def uniter_heads(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """State dicts of the objectives `mrfr` and `mrc` from a pretrained checkpoint."""
    return {name: {ours: weights[theirs] for ours, (theirs,) in made.items()} for name, made in HEADS.items()}


def from_bert(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The model's state dict without regions and matching, from BERT as transformers lays it out for pretraining: what
    UNITER begins with. Raises UserError where a tensor is missing or left over."""
    # The hub's first files have the norms' parameters by their names in TensorFlow.
    spelled = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    told: dict[str, Tensor] = {}
    for name, x in weights.items():
        new = name.replace("bert.", "uniter.", 1) if name.startswith("bert.") else name
        for old, now in spelled.items():
            new = new.replace(old, now)
        told[new] = x
    made = uniter_map(depth) | WORD_AND_MATCH
    made = {ours: parts for ours, parts in made.items() if not ours.startswith(("single.regions.", "single.match."))}
    unused = ("cls.seq_relationship.", "cls.predictions.decoder.", "uniter.embeddings.position_ids")
    return apply_map(told, WeightMap(made=made, unused=unused), source="BERT")
