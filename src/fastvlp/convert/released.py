"""A released checkpoint as a folder like a run's: weights, tokenizer, and what its training would have said of itself.

Sizes are read off the tensors. What these do not tell, such as the number of heads, is the published models'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlp.config import to_json
from fastvlp.convert.brivl import from_brivl
from fastvlp.convert.flip import from_flip
from fastvlp.convert.flm import from_flm
from fastvlp.convert.open_clip import from_openclip
from fastvlp.convert.options import Convert, Family
from fastvlp.convert.towers import load_weights
from fastvlp.convert.uniter import from_bert, from_uniter, uniter_heads
from fastvlp.data.regions import RegionSource
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.files import whole_folder, write_whole
from fastvlp.model import sizes
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import load_exactly, save_model
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import official_flm
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.objectives.region import MRCConfig, MRFRConfig
from fastvlp.objectives.saved_objectives import describe
from fastvlp.objectives.wra import WRAConfig

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Release:
    """config: complete but for the vocabulary. weights: of such a model, all but the parts `fresh`. objectives: that it was
    trained with; `learned`, what is known of them, keys `<name>.<parameter>`. data: how it reads images and texts."""

    config: ModelConfig
    weights: dict[str, Tensor]
    data: dict[str, Any]
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


def depth(weights: Weights, stem: str) -> int:
    return len({found[1] for name in weights if (found := re.match(rf"{re.escape(stem)}(\d+)", name))})


def tower(depth: int, width: int) -> sizes.Tower:
    """Heads of 64, but 16 where they are wider: CLIP's and FLIP's huge image towers."""
    return sizes.Tower(depth, width, max(1, min(16, width // 64)))


# As many regions as the released extraction kept; a crop would leave some out.
UNITER_DATA = {"regions": to_json(RegionSource(stored=True, most=100)), "max_length": 62, "fit": "squash"}


def uniter(weights: Weights, told: Convert) -> Release:
    layers, heads = depth(weights, "uniter.encoder.layer."), uniter_heads(weights)
    width, feature = weights["uniter.img_embeddings.img_linear.weight"].shape
    return Release(
        config=sizes.uniter(width=width, depth=layers, feature=feature),
        weights=from_uniter(weights, layers),
        data=UNITER_DATA,
        objectives={
            "itm": WRAConfig(),
            "mlm": MLMConfig(mask_rate=0.15, whole_word=False),
            "mrfr": MRFRConfig(),
            "mrc_kl": MRCConfig(classes=heads["mrc"]["classify.bias"].shape[0]),
        },
        learned={
            f"{ours}.{key}": x for ours, part in (("mrfr", "mrfr"), ("mrc_kl", "mrc")) for key, x in heads[part].items()
        },
    )


def bert(weights: Weights, told: Convert) -> Release:
    layers, width = depth(weights, "bert.encoder.layer."), weights["bert.pooler.dense.bias"].shape[0]
    return Release(
        config=sizes.uniter(width=width, depth=layers),
        weights=from_bert(weights, layers),
        data=UNITER_DATA,
        objectives={"mlm": MLMConfig(mask_rate=0.15, whole_word=False)},
        fresh=("single.regions.", "single.match."),
    )


def open_clip(weights: Weights, told: Convert) -> Release:
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    positions, text_width = weights["positional_embedding"].shape
    openai = "input_resolution" in weights
    config = sizes.clip(
        tower(depth(weights, "visual.transformer.resblocks."), width),
        tower(depth(weights, "transformer.resblocks."), text_width),
        width=weights["text_projection"].shape[1],
        size=isqrt(len(weights["visual.positional_embedding"])) * patch,
        patch=patch,
        positions=positions,
        activation=told.activation or ("quick_gelu" if openai else "gelu"),
    )
    return Release(
        config=config,
        weights=from_openclip(weights, config),
        data={"max_length": positions},
        objectives={"clip": CLIPConfig()},
        learned={"clip.log_scale": weights["logit_scale"].float().reshape(())},
    )


def flip(weights: Weights, told: Convert) -> Release:
    patch, _, _, width = weights["img_encoder/embedding/kernel"].shape
    length, text_width = weights["txt_encoder/posembed_encoder/pos_embedding"].shape[-2:]
    config = sizes.flip(
        tower(depth(weights, "img_encoder/Transformer/encoderblock_"), width),
        tower(depth(weights, "txt_encoder/Transformer/encoderblock_"), text_width),
        width=weights["img_mlp1/kernel"].shape[1],
        size=isqrt(weights["img_encoder/posembed_encoder/pos_embedding"].shape[-2]) * patch,
        patch=patch,
        length=length,
    )
    return Release(
        config=config,
        weights=from_flip(weights, config),
        data={"max_length": config.longest_text},
        objectives={"clip": CLIPConfig(bound="clip")},
        learned={"clip.log_scale": weights["logit_scale"].float().reshape(())},
    )


def brivl(weights: Weights, told: Convert) -> Release:
    config = sizes.brivl()
    # Its regions have the width of the CNN that is not here.
    fresh = ("image.", "embed.image.regions.project.")
    found = from_brivl(weights, config)
    return Release(
        config=config,
        weights={name: x for name, x in found.items() if not name.startswith(fresh)},
        data={
            "regions": to_json(RegionSource(whole=True)),
            "max_length": 80,
            "fit": "squash",
            "captions": "captions_zh",
        },
        objectives={"moco": MoCoConfig()},
        fresh=fresh,
    )


def flm(weights: Weights, told: Convert) -> Release:
    patch = weights["vit_model.visual.conv1.weight"].shape[-1]
    config = sizes.flm_base(size=isqrt(len(weights["vit_model.visual.positional_embedding"])) * patch)
    return Release(
        config=config,
        weights=from_flm(weights, config),
        data={"max_length": 50},
        objectives={"flm": official_flm()},
    )


FAMILIES: dict[Family, Callable[[Weights, Convert], Release]] = {
    "uniter": uniter,
    "bert": bert,
    "open_clip": open_clip,
    "flip": flip,
    "brivl": brivl,
    "flm": flm,
}


def convert(told: Convert) -> tuple[VLModel, tuple[str, ...]]:
    """Writes the folder. Returns the model, and the parts of it that the checkpoint does not have (drawn from seed 0).

    Raises UserError where a file is missing or damaged, laid out otherwise, or of another tokenizer, and where something is
    in the way."""
    if told.activation is not None and told.family != "open_clip":
        raise UserError(f"--activation: {told.family} has one of its own; leave it out")
    with whole_folder(told.out) as part:
        path = told.checkpoint
        release = recognised(path, told)
        # CLIP's vocabulary has neither padding nor a mask.
        complete = told.family == "open_clip"
        tokenizer = Tokenizer.load(told.tokenizer or path.with_name("tokenizer.json"), complete=complete)
        torch.manual_seed(0)
        model = VLModel(sizes.with_tokenizer(release.config, tokenizer))
        own = model.state_dict()
        state = {name: x for name, x in own.items() if name.startswith(release.fresh or ("\0",))} | release.weights
        word, rows = "text.word.weight", own["text.word.weight"]
        if complete and 0 < len(rows) - len(state[word]) <= 2:
            state[word] = torch.cat([state[word], rows[len(state[word]) :]])
        load_exactly(model, state, path)
        objectives = {name: config.build(model.config, tokenizer) for name, config in release.objectives.items()}
        info = {"name": told.out.name, "step": 0, **describe(release.objectives, objectives)}
        save_model(part, model, tokenizer, info, objectives=release.learned)
        config = {"name": told.out.name, "data": release.data, "objectives": info["objectives"]}
        write_whole(part / "config.json", json.dumps(config, indent=2).encode())
    return model, release.fresh


def recognised(path: Path, told: Convert) -> Release:
    """Raises UserError for a file that is not what `told.family` says."""
    weights, wrong = load_weights(path), f"{path}: not laid out as {told.family}"
    remedy = "name the family that it is of, and the file as it was released"
    try:
        return FAMILIES[told.family](weights, told)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{wrong}: it has no {error.args[0]}; {remedy}") from error
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{wrong}: {error}; {remedy}") from error
