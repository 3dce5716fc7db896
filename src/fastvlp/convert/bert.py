"""BERT (arXiv 1810.04805) as transformers publishes it for pretraining: what UNITER begins with."""

from __future__ import annotations

from torch import Tensor

from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.uniter import DATA, WORD_AND_MATCH, uniter_config, uniter_encoder
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map
from fastvlp.objectives.mlm import MLMConfig

# Parts of UNITER that BERT lacks.
UNTRAINED = ("single.regions.", "single.match.")


def from_bert(weights: Weights, depth: int) -> dict[str, Tensor]:
    """The state dict of a model of `sizes.uniter`, but for regions and matching. Raises UserError if a tensor is missing or
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


class UNITERStartLayout(Layout):
    name = "uniter_start"
    summary = "BERT with its heads, made a single stream over words and regions; never recognised, always named"
    options = ("heads",)

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        config = uniter_config(source, stated, "bert.")
        assert config.single is not None
        return Release(
            config=config,
            weights=from_bert(source.weights, config.single.depth),
            data=DATA,
            objectives={"mlm": MLMConfig(mask_rate=0.15, whole_word=False)},
            untrained=UNTRAINED,
        )
