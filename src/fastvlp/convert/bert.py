"""BERT (arXiv 1810.04805) as transformers publishes it for pretraining: what UNITER begins with."""

from __future__ import annotations

from torch import Tensor

from fastvlp.convert.interface import Layout, Release
from fastvlp.convert.uniter import DATA, WORD_AND_MATCH, uniter_encoder
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers
from fastvlp.model import sizes
from fastvlp.model.layers import Activation
from fastvlp.objectives.mlm import MLMConfig

# Parts of UNITER that BERT lacks.
UNTRAINED = ("single.regions.", "single.match.")


def from_bert(weights: Weights, depth: int) -> dict[str, Tensor]:
    """The state dict of a model of `sizes.uniter`, but for regions and matching. Raises UserError where a tensor is missing or
    left over."""
    # The hub's first files have the norms' parameters by their names in TensorFlow.
    tensorflow = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    renamed: dict[str, Tensor] = {}
    for name, x in weights.items():
        new = name.replace("bert.", "uniter.", 1) if name.startswith("bert.") else name
        for old, current in tensorflow.items():
            new = new.replace(old, current)
        renamed[new] = x
    sources = uniter_encoder(depth) | WORD_AND_MATCH
    sources = {ours: parts for ours, parts in sources.items() if not ours.startswith(UNTRAINED)}
    unused = ("cls.seq_relationship.", "cls.predictions.decoder.", "uniter.embeddings.position_ids")
    return apply_map(renamed, WeightMap(sources=sources, unused=unused), layout="BERT")


class BERTLayout(Layout):
    name = "bert"

    def read(self, weights: Weights, activation: Activation | None = None) -> Release:
        depth = len(layer_numbers(weights, "bert.encoder.layer."))
        return Release(
            config=sizes.uniter(width=weights["bert.pooler.dense.bias"].shape[0], depth=depth),
            weights=from_bert(weights, depth),
            data=DATA,
            objectives={"mlm": MLMConfig(mask_rate=0.15, whole_word=False)},
            untrained=UNTRAINED,
        )
