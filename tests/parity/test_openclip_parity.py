"""Parity of both towers with open_clip, through the converter: features, CLIP's and SigLIP's losses, gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.convert.open_clip import PROJECTIONS, clip_map, from_open_clip
from fastvlp.model import sizes
from fastvlp.model.model import VLModel
from fastvlp.objectives.clip import CLIP, CLIPConfig
from fastvlp.objectives.objective import PairObjective, combine
from fastvlp.objectives.siglip import SigLIP, SigLIPConfig
from tests.golden import assert_close, load


@cache
def golden():
    return load("clip_openclip")


def built() -> VLModel:
    c, _, weights, _ = golden()
    v, t = (c["model"][f"{kind}_cfg"] for kind in ("vision", "text"))
    config = sizes.clip(
        sizes.Tower(v["layers"], v["width"], v["width"] // v["head_width"]),
        sizes.Tower(t["layers"], t["width"], t["heads"]),
        width=c["model"]["embed_dim"],
        size=v["image_size"],
        patch=v["patch_size"],
        positions=t["context_length"],
        activation="quick_gelu" if c["model"]["quick_gelu"] else "gelu",
    )
    model = VLModel(replace(config, text=replace(config.text, vocab=t["vocab_size"])))
    model.load_state_dict(from_open_clip(weights))
    return model


def batch() -> Batch:
    """open_clip pools at the largest id, the end of the text."""
    _, _, _, known = golden()
    length = known["in.text"].argmax(1) + 1
    return Batch(image=known["in.image"], ids=known["in.text"], length=length, seed=torch.zeros_like(length))


def objective(name: str) -> PairObjective:
    _, _, weights, known = golden()
    if name == "clip":
        made: PairObjective = CLIP(CLIPConfig())
        made.load_state_dict({"log_scale": weights["logit_scale"]})
    else:
        made = SigLIP(SigLIPConfig())
        made.load_state_dict({"log_scale": known["in.siglip_logit_scale"], "bias": known["in.siglip_logit_bias"]})
    return made


def test_features():
    _, tol, _, known = golden()
    model = built()
    image, text = objective("clip").embed(model, model.encode_image(batch().image), batch())
    assert_close(image, known["out.image_features"], tol["out.image_features"], "image")
    assert_close(text, known["out.text_features"], tol["out.text_features"], "text")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_losses_and_gradients_of_the_towers(name):
    _, tol, _, known = golden()
    model, scored = built(), objective(name)
    loss = combine(scored(model, model.encode_image(batch().image), batch()))
    assert_close(loss, known[f"out.{name}_loss"], tol[f"out.{name}_loss"], "loss")
    loss.backward()
    sources = clip_map(len(model.image.blocks), len(model.text.blocks)).sources
    gradients = {theirs: model.get_parameter(ours).grad for ours, (theirs,) in sources.items()}
    own: dict[str, Tensor] = {"logit_scale": scored.log_scale.grad}
    if name == "siglip":
        own = {"siglip_logit_scale": scored.log_scale.grad, "siglip_logit_bias": scored.bias.grad}
    stored = {key.removeprefix(f"grad.{name}."): key for key in known if key.startswith(f"grad.{name}.")}
    stored = {part: key for part, key in stored.items() if not part.endswith("_features")}
    for part, key in stored.items():
        mine = own[part] if part in own else gradients[part]
        mine = mine.T if part in PROJECTIONS else mine
        assert_close(mine.reshape(known[key].shape), known[key], tol[key], key)
    assert own.keys() <= stored.keys() and len(stored) >= 5
