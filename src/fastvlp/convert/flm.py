"""Weights of public checkpoints: explicit maps from their names to ours, nothing left over.

A map says, for each parameter of ours, which source tensors make it (several are stacked along the first axis: query, key
and value are one matrix here) and which source tensors are knowingly unused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """`made`: our parameter -> source names. `unused`: prefixes of source tensors that have no place here."""

    made: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...] = ()
    reshaped: frozenset[str] = field(default_factory=frozenset)


def apply_map(weights: Mapping[str, Tensor], names: WeightMap, *, source: str) -> dict[str, Tensor]:
    """Our tensors from theirs. Raises UserError where a tensor is missing or one of theirs is left over."""
    used = {name for parts in names.made.values() for name in parts}
    missing = sorted(used - set(weights))
    left = sorted(k for k in weights if k not in used and not k.startswith(names.unused or ("\0",)))
    if missing or left:
        raise UserError(
            f"these weights are not laid out as {source}: missing {missing[:5]}, left over {left[:5]} "
            f"({len(missing)} and {len(left)} in all); check the checkpoint's origin and the model size"
        )
    made = {
        ours: torch.cat([weights[p] for p in parts]) if len(parts) > 1 else weights[parts[0]]
        for ours, parts in names.made.items()
    }
    return {ours: value.flatten(1) if ours in names.reshaped else value for ours, value in made.items()}


def vit(config: ModelConfig) -> ViTConfig:
    """The image encoder of a model that is laid out like a public one. Raises UserError where it is no ViT."""
    if not isinstance(config.image, ViTConfig):
        raise UserError(f"`model.image` is a {type(config.image).__name__}, and these weights are a ViT's")
    return config.image


def _both(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}


def _bert_layer(ours: str, theirs: str, *, attend: bool, cross: bool) -> dict[str, tuple[str, ...]]:
    """A BERT/RoBERTa layer of transformers, with METER's `crossattention` where there is one."""
    made: dict[str, tuple[str, ...]] = {}
    if attend:
        own = f"{theirs}.attention"
        made |= _both(f"{ours}.attend.qkv", *(f"{own}.self.{part}" for part in ("query", "key", "value")))
        made |= _both(f"{ours}.attend.out", f"{own}.output.dense")
        made |= _both(f"{ours}.attend_norm", f"{own}.output.LayerNorm")
    if cross:
        other = f"{theirs}.crossattention"
        made |= _both(f"{ours}.cross.query", f"{other}.self.query")
        made |= _both(f"{ours}.cross.kv", f"{other}.self.key", f"{other}.self.value")
        made |= _both(f"{ours}.cross.out", f"{other}.output.dense")
        made |= _both(f"{ours}.cross_norm", f"{other}.output.LayerNorm")
    made |= _both(f"{ours}.mlp_in", f"{theirs}.intermediate.dense")
    made |= _both(f"{ours}.mlp_out", f"{theirs}.output.dense")
    return made | _both(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")


def _clip_visual(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    """OpenAI's CLIP image tower (`visual.*`), without its projection."""
    made = {
        f"{ours}.patch.weight": (f"{theirs}.conv1.weight",),
        f"{ours}.position": (f"{theirs}.positional_embedding",),
        f"{ours}.class_token": (f"{theirs}.class_embedding",),
        **_both(f"{ours}.embed_norm", f"{theirs}.ln_pre"),
        **_both(f"{ours}.norm", f"{theirs}.ln_post"),
    }
    return made | _clip_blocks(ours, f"{theirs}.transformer", depth)


def _clip_blocks(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    made: dict[str, tuple[str, ...]] = {}
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}.resblocks.{i}"
        for kind in ("weight", "bias"):
            made[f"{block}.attend.qkv.{kind}"] = (f"{source}.attn.in_proj_{kind}",)
        made |= _both(f"{block}.attend.out", f"{source}.attn.out_proj")
        made |= _both(f"{block}.attend_norm", f"{source}.ln_1") | _both(f"{block}.mlp_norm", f"{source}.ln_2")
        made |= _both(f"{block}.mlp_in", f"{source}.mlp.c_fc") | _both(f"{block}.mlp_out", f"{source}.mlp.c_proj")
    return made


def _hf_clip_visual(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    """The same tower in transformers' layout (`vision_model.*`; `pre_layrnorm` is their spelling)."""
    made = {
        f"{ours}.patch.weight": (f"{theirs}.embeddings.patch_embedding.weight",),
        f"{ours}.position": (f"{theirs}.embeddings.position_embedding.weight",),
        f"{ours}.class_token": (f"{theirs}.embeddings.class_embedding",),
        **_both(f"{ours}.embed_norm", f"{theirs}.pre_layrnorm"),
        **_both(f"{ours}.norm", f"{theirs}.post_layernorm"),
    }
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}.encoder.layers.{i}"
        made |= _both(f"{block}.attend.qkv", *(f"{source}.self_attn.{p}_proj" for p in "qkv"))
        made |= _both(f"{block}.attend.out", f"{source}.self_attn.out_proj")
        made |= _both(f"{block}.attend_norm", f"{source}.layer_norm1") | _both(
            f"{block}.mlp_norm", f"{source}.layer_norm2"
        )
        made |= _both(f"{block}.mlp_in", f"{source}.mlp.fc1") | _both(f"{block}.mlp_out", f"{source}.mlp.fc2")
    return made


def _roberta(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    made = {
        f"{ours}.word.weight": (f"{theirs}embeddings.word_embeddings.weight",),
        f"{ours}.position.weight": (f"{theirs}embeddings.position_embeddings.weight",),
        **_both(f"{ours}.norm", f"{theirs}embeddings.LayerNorm"),
    }
    for i in range(depth):
        made |= _bert_layer(f"{ours}.blocks.{i}", f"{theirs}encoder.layer.{i}", attend=True, cross=False)
    return made


def _fold_type(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """RoBERTa has one token type, added to every position: it is folded into the position table."""
    folded = dict(weights)
    kind = folded.pop(f"{prefix}embeddings.token_type_embeddings.weight")
    name = f"{prefix}embeddings.position_embeddings.weight"
    folded[name] = weights[name] + kind
    return folded


def _dropped_layers(weights: Iterable[str], stem: str, depth: int) -> tuple[str, ...]:
    """Prefixes of the layers from `depth` on, which the model does not have."""
    numbers = {int(k.removeprefix(stem).split(".")[0]) for k in weights if k.startswith(stem)}
    return tuple(f"{stem}{i}." for i in sorted(numbers) if i >= depth)


def from_clip(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """`image.*` of ours from CLIP's image tower, OpenAI's or transformers' layout; blocks from `depth` on are left out
    (FLM keeps 11 of 12: arXiv 2303.14038, released code)."""
    hf = "vision_model.embeddings.class_embedding" in weights
    source = "vision_model" if hf else "visual"
    stem = f"{source}.encoder.layers." if hf else f"{source}.transformer.resblocks."
    made = (_hf_clip_visual if hf else _clip_visual)("image", source, depth)
    unused = (
        *_dropped_layers(weights, stem, depth),
        "vision_model.embeddings.position_ids",
        "text_model.",
        "text_projection",
        "visual_projection",
        "visual.proj",
        "logit_scale",
        "transformer.",
        "token_embedding.",
        "positional_embedding",
        "ln_final.",
    )
    names = WeightMap(made=made, unused=unused, reshaped=frozenset({"image.patch.weight"}))
    return apply_map(weights, names, source="CLIP")


def from_roberta(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """`text.*` of ours from transformers' RobertaModel (with or without the `roberta.` prefix), first `depth` layers."""
    prefix = "roberta." if any(k.startswith("roberta.") for k in weights) else ""
    unused = (
        *_dropped_layers(weights, f"{prefix}encoder.layer.", depth),
        f"{prefix}pooler.",
        f"{prefix}embeddings.position_ids",
        "lm_head.",
    )
    made = _roberta("text", prefix, depth)
    return apply_map(_fold_type(weights, prefix), WeightMap(made=made, unused=unused), source="RoBERTa")


# The same tensors under second names, and tensors that nothing reads (spec flm.md, end of section 7).
_FLM_UNUSED = (
    "text_transformer2.",
    "text_transformer.pooler.",
    "text_transformer.embeddings.position_ids",
    "cross_modal_layers.",
    "cross_modal_text_layers_r.",
    "cross_modal_text_transform_r.",
    "cross_modal_text_transform_f.",
    "fusion_token_embedding.",
    "lm_type_embeddings.",
    "cross_modal_image_pooler.",
    "vit_model.ln_final.",
    "vit_model.positional_embedding",
    "vit_model.logit_scale",
    "vit_model.text_projection",
    "vit_model.token_embedding.",
    "vit_model.visual.proj",
)
# Parts of downstream and baseline heads: read by `task_weights`, not by the model.
FLM_HEADS = (
    "cross_modal_text_pooler.",
    "cross_modal_text_pooler_f.",
    "vqa_classifier.",
    "nlvr2_classifier.",
    "rank_output.",
    "itm_score.",
    "itm_score_flm.",
)


def flm_map(config: ModelConfig, *, head: str = "lm_score") -> WeightMap:
    """The released FLM's layout (TencentARC/FLM bd8b19d). `head`: `lm_score` (FLM, AR) or `mlm_score` (the MLM model).

    Released files name the forward stream's head `lm_score_r` and the reverse one's `lm_score_f` (O9).
    """
    made = _clip_visual("image", "vit_model.visual", vit(config).depth)
    made |= _roberta("text", "text_transformer.", config.text.depth)
    made |= _both("fusion.text_in", "cross_modal_text_transform") | _both(
        "fusion.image_in", "cross_modal_image_transform"
    )
    for i in range(config.fusion.depth if config.fusion else 0):
        made |= _bert_layer(f"fusion.blocks.{i}", f"cross_modal_text_layers.{i}", attend=True, cross=True)
    made |= {"fusion.text_type": ("type.text",), "fusion.image_type": ("type.image",)}
    unused = [*_FLM_UNUSED, *FLM_HEADS]
    if config.reconstructor:
        for stage in ("bottom", "top"):
            for i in range(getattr(config.reconstructor, stage)):
                theirs = f"fusion_layers_{stage}.{i}"
                made |= _bert_layer(f"reconstructor.{stage}.{i}", theirs, attend=False, cross=True)
        made |= {"reconstructor.reverse_type": ("type.reverse",), "reconstructor.query_type": ("type.query",)}
    else:
        unused += ["fusion_layers_", "type.reverse", "type.query"]
    heads = {"head": head}
    if config.separate_heads:
        heads |= {"forward_head": "lm_score_r", "reverse_head": "lm_score_f"}
    for ours, theirs in heads.items():
        made |= _both(f"{ours}.transform", f"{theirs}.transform.dense") | _both(
            f"{ours}.norm", f"{theirs}.transform.LayerNorm"
        )
        made |= {
            f"{ours}.vocabulary.weight": (f"{theirs}.decoder.weight",),
            f"{ours}.vocabulary.bias": (f"{theirs}.bias",),
        }
    unused += [
        f"{name}." for name in ("lm_score", "lm_score_r", "lm_score_f", "mlm_score") if name not in heads.values()
    ]
    return WeightMap(made=made, unused=tuple(unused), reshaped=frozenset({"image.patch.weight"}))


def split_flm_types(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two type tables cut into the rows that ours name; image rows 1 (and 2: NLVR2's second image, else a copy)."""
    out = {k: v for k, v in weights.items() if not k.startswith("token_type_embeddings")}
    table, own = weights["token_type_embeddings.weight"], weights.get("token_type_embeddings_flm.weight")
    out["type.text"] = table[0]
    out["type.image"] = table[1:] if len(table) > 2 else table[1:2].repeat(2, 1)
    if own is not None:
        out["type.reverse"], out["type.query"] = own[0], own[1]
    return out


def from_flm(weights: Mapping[str, Tensor], config: ModelConfig, *, head: str = "lm_score") -> dict[str, Tensor]:
    """A VLModel's state dict from a checkpoint of the released FLM code (or of its MLM and AR baselines)."""
    prepared = split_flm_types(_fold_type(weights, "text_transformer."))
    return apply_map(prepared, flm_map(config, head=head), source="the released FLM code")
