"""Names of BERT's and RoBERTa's parameters in transformers, which the codes of METER, FLM, UNITER and BriVL took over."""

from __future__ import annotations

from torch import Tensor

from fastvlp.convert.weight_map import Weights, weight_and_bias


def bert_layer(ours: str, theirs: str, *, attend: bool, cross: bool) -> dict[str, tuple[str, ...]]:
    """One layer, with METER's `crossattention` where there is one."""
    sources: dict[str, tuple[str, ...]] = {}
    if attend:
        own = f"{theirs}.attention"
        sources |= weight_and_bias(f"{ours}.attend.qkv", *(f"{own}.self.{part}" for part in ("query", "key", "value")))
        sources |= weight_and_bias(f"{ours}.attend.out", f"{own}.output.dense")
        sources |= weight_and_bias(f"{ours}.attend_norm", f"{own}.output.LayerNorm")
    if cross:
        other = f"{theirs}.crossattention"
        sources |= weight_and_bias(f"{ours}.cross.query", f"{other}.self.query")
        sources |= weight_and_bias(f"{ours}.cross.kv", f"{other}.self.key", f"{other}.self.value")
        sources |= weight_and_bias(f"{ours}.cross.out", f"{other}.output.dense")
        sources |= weight_and_bias(f"{ours}.cross_norm", f"{other}.output.LayerNorm")
    sources |= weight_and_bias(f"{ours}.mlp_in", f"{theirs}.intermediate.dense")
    sources |= weight_and_bias(f"{ours}.mlp_out", f"{theirs}.output.dense")
    return sources | weight_and_bias(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")


def roberta_encoder(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    """Embeddings and the first `depth` layers of a text transformer. `theirs` is a prefix, such as `roberta.`."""
    sources = {
        f"{ours}.word.weight": (f"{theirs}embeddings.word_embeddings.weight",),
        f"{ours}.position.weight": (f"{theirs}embeddings.position_embeddings.weight",),
        **weight_and_bias(f"{ours}.norm", f"{theirs}embeddings.LayerNorm"),
    }
    for i in range(depth):
        sources |= bert_layer(f"{ours}.blocks.{i}", f"{theirs}encoder.layer.{i}", attend=True, cross=False)
    return sources


def with_type_in_positions(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights without the table of token types. All words have its first type, whose vector is added to each position."""
    folded = dict(weights)
    types = folded.pop(f"{prefix}embeddings.token_type_embeddings.weight")
    positions = f"{prefix}embeddings.position_embeddings.weight"
    folded[positions] = weights[positions] + types[0]
    return folded
