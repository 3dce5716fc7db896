"""BriVL 1.0 (arXiv 2103.06561; BAAI-WuDao/BriVL bb8d95b): text encoder and both heads. Its CNN has no counterpart here."""

from __future__ import annotations

from torch import Tensor

from fastvlp.config import to_json
from fastvlp.convert.bert_layers import roberta_encoder, with_type_in_positions
from fastvlp.convert.interface import Layout, Release
from fastvlp.convert.weight_map import Sources, WeightMap, Weights, apply_map, layer_numbers, weight_and_bias
from fastvlp.data.regions import RegionSource
from fastvlp.model import sizes
from fastvlp.model.layers import Activation
from fastvlp.objectives.moco import MoCoConfig

IMAGE, TEXT = "learnable.imgencoder", "learnable.textencoder"
BERT = f"{TEXT}.backbone.bert."
# The CNN, momentum copies, queues, and what nothing reads.
UNUSED = (
    f"{IMAGE}.backbone.",
    f"{IMAGE}_mom.",
    f"{TEXT}_mom.",
    f"{BERT}pooler.",
    f"{BERT}embeddings.position_ids",
    "img_queue",
    "text_queue",
)


def _head(ours: str, theirs: str, depth: int) -> Sources:
    """Blocks of torch's TransformerEncoder, and the two linear maps that follow. `theirs` ends in `img` or `text`."""
    sources = weight_and_bias(f"{ours}.hidden", f"{theirs}FC.fc1") | weight_and_bias(f"{ours}.out", f"{theirs}FC.fc2")
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}Att.layers.{i}"
        for part in ("weight", "bias"):
            sources[f"{block}.attend.qkv.{part}"] = (f"{source}.self_attn.in_proj_{part}",)
        sources |= weight_and_bias(f"{block}.attend.out", f"{source}.self_attn.out_proj")
        sources |= weight_and_bias(f"{block}.attend_norm", f"{source}.norm1")
        sources |= weight_and_bias(f"{block}.mlp_norm", f"{source}.norm2")
        sources |= weight_and_bias(f"{block}.mlp_in", f"{source}.linear1")
        sources |= weight_and_bias(f"{block}.mlp_out", f"{source}.linear2")
    return sources


def from_brivl(weights: Weights) -> dict[str, Tensor]:
    """`text.*` and `embed.*` of a model with BriVL's heads (`sizes.brivl`) from a released checkpoint, or from its query
    encoders alone. Raises UserError where a tensor is missing or left over."""
    sources = roberta_encoder("text", BERT, len(layer_numbers(weights, f"{BERT}encoder.layer.")))
    for part, theirs in (("image", f"{IMAGE}.learnable.img"), ("text", f"{TEXT}.learnable.text")):
        sources |= _head(f"embed.{part}", theirs, len(layer_numbers(weights, f"{theirs}Att.layers.")))
    sources |= weight_and_bias("embed.image.regions.project", f"{IMAGE}.learnable.max_pool.0")
    names = WeightMap(sources=sources, unused=UNUSED, flattened=frozenset({"embed.image.regions.project.weight"}))
    return apply_map(with_type_in_positions(weights, BERT), names, layout="BriVL")


class BriVLLayout(Layout):
    name = "brivl"

    def read(self, weights: Weights, activation: Activation | None = None) -> Release:
        # The projection of regions is as wide as the CNN, which is not here.
        untrained = ("image.", "embed.image.regions.project.")
        return Release(
            config=sizes.brivl(),
            weights={name: x for name, x in from_brivl(weights).items() if not name.startswith(untrained)},
            data={
                "regions": to_json(RegionSource(whole=True)),
                "max_length": 80,
                "fit": "squash",
                "captions": "captions_zh",
            },
            objectives={"moco": MoCoConfig()},
            untrained=untrained,
        )
