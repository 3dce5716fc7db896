"""BriVL 1.0 (arXiv 2103.06561; BAAI-WuDao/BriVL bb8d95b) and 2 (arXiv 2110.14378): both encoders and their heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from fastvlp.config import to_json
from fastvlp.convert.bert_layers import roberta_encoder, with_type_in_positions
from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.efficientnet import efficientnet_config, efficientnet_weights
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from fastvlp.convert.published_shapes import BERT as PUBLISHED
from fastvlp.convert.published_shapes import head_counts
from fastvlp.convert.weight_map import Sources, WeightMap, Weights, apply_map, layer_numbers, weight_and_bias
from fastvlp.data.regions import RegionSource
from fastvlp.errors import UserError
from fastvlp.model.encoders.absent_encoders import AbsentImagesConfig
from fastvlp.model.encoders.interface import ImageEncoderConfig
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig
from fastvlp.model.sizes import region_heads
from fastvlp.objectives.moco import MoCoConfig

IMAGE, TEXT = "learnable.imgencoder", "learnable.textencoder"
BERT, CNN = f"{TEXT}.backbone.bert.", f"{IMAGE}.backbone.conv_stem.weight"
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
    encoders alone. Raises UserError if a tensor is missing or left over."""
    sources = roberta_encoder("text", BERT, len(layer_numbers(weights, f"{BERT}encoder.layer.")))
    for part, theirs in (("image", f"{IMAGE}.learnable.img"), ("text", f"{TEXT}.learnable.text")):
        sources |= _head(f"embed.{part}", theirs, len(layer_numbers(weights, f"{theirs}Att.layers.")))
    sources |= weight_and_bias("embed.image.regions.project", f"{IMAGE}.learnable.max_pool.0")
    names = WeightMap(sources=sources, unused=UNUSED, flattened=frozenset({"embed.image.regions.project.weight"}))
    return apply_map(with_type_in_positions(weights, BERT), names, layout="BriVL")


# cfg/test_xyb.yml of the release; its text encoder is hfl/chinese-roberta-wwm-ext.
RELEASED: Mapping[str, Any] = {
    "CNN": "tf_efficientnet_b5_ns",
    "IMG_SIZE": 380,
    "IMG_FEATURE_DIM": 2048,
    "IMG_TRANSFORMER_HEAD": 4,
    "TEXT_TRANSFORMER_HEAD": 4,
    "MAX_TEXT_LEN": 80,
    "MAX_IMG_LEN": 37,
    "GRID_SIZE": 4,
}


def brivl_settings(source: Checkpoint, width: int, released: Mapping[str, Any]) -> Mapping[str, Any]:
    """The release's config, which a .yml states for models of another width. Raises UserError if it lacks a field."""
    stated = source.settings.get("MODEL", source.settings)
    settings = {**released, **stated} if width == released["IMG_FEATURE_DIM"] else stated
    if missing := sorted(released.keys() - settings.keys() - {"CNN", "IMG_FEATURE_DIM"}):
        raise UserError(
            f"its joint space has {width} dimensions, but the release has {released['IMG_FEATURE_DIM']}, and nothing tells "
            f"{', '.join(missing)}: name its .yml as `config`"
        )
    return settings


def brivl_images(source: Checkpoint, settings: Mapping[str, Any], width: int) -> ImageEncoderConfig:
    """The CNN, where the checkpoint has it; else a stand-in with the map that the heads read."""
    size = settings["IMG_SIZE"]
    if CNN in source.names:
        return efficientnet_config(settings.get("CNN", RELEASED["CNN"]), size)
    # A CNN of five stages halves the image five times.
    return AbsentImagesConfig(size=size, width=width, grid=-(-size // 32), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def brivl_config(source: Checkpoint, stated: Stated, settings: Mapping[str, Any], grid: int | None) -> ModelConfig:
    """The model of the tensors."""
    weights, image, text = source.weights, f"{IMAGE}.learnable.img", f"{TEXT}.learnable.text"
    words = weights[f"{BERT}embeddings.word_embeddings.weight"]
    depth = len(layer_numbers(weights, f"{BERT}encoder.layer."))
    known = {
        "regions": settings["IMG_TRANSFORMER_HEAD"],
        "words": settings["TEXT_TRANSFORMER_HEAD"],
        "BERT": PUBLISHED.get((words.shape[1], depth)),
    }
    heads, text_heads, bert_heads = head_counts(stated, known)
    bert = LayerConfig(
        width=words.shape[1],
        heads=bert_heads,
        hidden=len(weights[f"{BERT}encoder.layer.0.intermediate.dense.bias"]),
        norm="post",
        eps=1e-12,
        dropout=0.1,
    )
    positions = len(weights[f"{BERT}embeddings.position_embeddings.weight"])
    projected = weights[f"{IMAGE}.learnable.max_pool.0.weight"]
    config = ModelConfig(
        image=brivl_images(source, settings, projected.shape[1]),
        text=TextTransformerConfig(positions=positions, depth=depth, layer=bert, embed_eps=1e-12),
    )
    regions, own = (
        LayerConfig(
            width=weights[f"{name}FC.fc1.weight"].shape[1],
            heads=count,
            hidden=len(weights[f"{name}Att.layers.0.linear1.bias"]),
            norm="post",
            activation="relu",
            dropout=0.1,
        )
        for name, count in ((image, heads), (text, text_heads))
    )
    embed = region_heads(
        config,
        width=len(weights[f"{image}FC.fc2.bias"]),
        layer=regions,
        depth=len(layer_numbers(weights, f"{image}Att.layers.")),
        grid=grid,
        place="released",
    )
    assert embed.image.regions is not None
    return replace(
        config,
        embed=replace(
            embed,
            image=replace(embed.image, regions=replace(embed.image.regions, samples=settings["GRID_SIZE"])),
            text=replace(embed.text, depth=len(layer_numbers(weights, f"{text}Att.layers.")), layer=own),
            # BERT attends to padding, up to the length that all texts are padded to.
            text_mask="none",
            text_length=settings["MAX_TEXT_LEN"],
        ),
    )


class BriVLLayout(Layout):
    name = "brivl"
    summary = "BriVL 1.0, whose images are read with a detector's boxes"
    options = ("heads",)
    released: ClassVar[Mapping[str, Any]] = RELEASED
    grid: ClassVar[int | None] = None

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        return cls.grid is None and f"{IMAGE}.learnable.max_pool.0.weight" in source.names

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        weights = source.weights
        settings = brivl_settings(source, len(weights[f"{IMAGE}.learnable.imgFC.fc2.bias"]), self.released)
        config = brivl_config(source, stated, settings, self.grid)
        own = from_brivl(weights)
        if config.image.present:
            own |= {f"image.{name}": x for name, x in efficientnet_weights(weights, f"{IMAGE}.backbone.").items()}
        # The cells of a grid are the head's own.
        regions = None if self.grid else RegionSource(whole=True, most=settings["MAX_IMG_LEN"] - 1)
        return Release(
            config=config,
            weights=own,
            data={
                "regions": to_json(regions),
                "max_length": settings["MAX_TEXT_LEN"],
                "fit": "squash",
                "captions": "captions_zh",
            },
            objectives={"moco": MoCoConfig()},
            needs=frozenset({"pad", "bos", "eos"}),
        )


class BriVL2Layout(BriVLLayout):
    name = "brivl2"
    summary = (
        "BriVL 2, whose images are read by a 6x6 grid; its tensors are called like BriVL's, so that it is always named"
    )
    released: ClassVar[Mapping[str, Any]] = {**RELEASED, "IMG_SIZE": 456}
    grid = 6
