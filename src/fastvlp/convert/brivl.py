"""Weights of the released BriVL 1.0 (BAAI-WuDao/BriVL bb8d95b): text tower and both heads. Its CNN has no place here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastvlp.convert.flm import WeightMap, _both, _roberta, apply_map
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig

IMAGE, TEXT = "learnable.imgencoder", "learnable.textencoder"
# The CNN, momentum copies, queues, and what nothing reads.
UNUSED = (
    f"{IMAGE}.backbone.",
    f"{IMAGE}_mom.",
    f"{TEXT}_mom.",
    f"{TEXT}.backbone.bert.pooler.",
    f"{TEXT}.backbone.bert.embeddings.position_ids",
    "img_queue",
    "text_queue",
)


def _head(ours: str, theirs: str, kind: str, depth: int) -> dict[str, tuple[str, ...]]:
    """Blocks of torch's TransformerEncoder, and the two linear maps behind them."""
    made = _both(f"{ours}.hidden", f"{theirs}.{kind}FC.fc1") | _both(f"{ours}.out", f"{theirs}.{kind}FC.fc2")
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}.{kind}Att.layers.{i}"
        for part in ("weight", "bias"):
            made[f"{block}.attend.qkv.{part}"] = (f"{source}.self_attn.in_proj_{part}",)
        made |= _both(f"{block}.attend.out", f"{source}.self_attn.out_proj")
        made |= _both(f"{block}.attend_norm", f"{source}.norm1") | _both(f"{block}.mlp_norm", f"{source}.norm2")
        made |= _both(f"{block}.mlp_in", f"{source}.linear1") | _both(f"{block}.mlp_out", f"{source}.linear2")
    return made


def from_brivl(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`text.*` and `embed.*` of a VLModel with BriVL's heads (`sizes.brivl`) from a released checkpoint, or from its query
    towers alone. Raises UserError where a tensor is missing or left over."""
    if config.embed is None:
        raise UserError("BriVL's weights are of two towers with heads; give model.embed, as sizes.brivl does")
    bert = f"{TEXT}.backbone.bert."
    made = _roberta("text", bert, config.text.depth)
    made |= _head("embed.image", f"{IMAGE}.learnable", "img", config.embed.image.depth)
    made |= _head("embed.text", f"{TEXT}.learnable", "text", config.embed.text.depth)
    made |= _both("embed.image.regions.project", f"{IMAGE}.learnable.max_pool.0")
    told = dict(weights)
    # All words are of BERT's first type, whose vector is folded into the positions.
    kinds = told.pop(f"{bert}embeddings.token_type_embeddings.weight")
    place = f"{bert}embeddings.position_embeddings.weight"
    told[place] = told[place] + kinds[0]
    names = WeightMap(made=made, unused=UNUSED, reshaped=frozenset({"embed.image.regions.project.weight"}))
    return apply_map(told, names, source="BriVL")
