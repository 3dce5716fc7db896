"""Parity with the released FLIP (flax, run in JAX): both towers, logits, loss and gradients, masked and whole."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.convert.flip import flip_map, from_flax, from_flip
from fastvlp.errors import UserError
from fastvlp.model import sizes
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.clip import CLIP, CLIPConfig
from fastvlp.objectives.objective import Loss, combine
from tests.golden import assert_close, load


@cache
def golden():
    return load("flip_forward")


def model_config() -> ModelConfig:
    c, _, _, _ = golden()
    towers = (sizes.Tower(c[f"{kind}_layers"], c[f"{kind}_width"], c[f"{kind}_heads"]) for kind in ("img", "txt"))
    config = sizes.flip_published(*towers, width=c["proj"], size=c["image"], patch=c["patch"], length=c["txt_len"])
    text, image = config.text, config.image
    return replace(
        config,
        text=replace(text, vocab=c["vocab"], layer=replace(text.layer, hidden=c["txt_mlp"])),
        image=replace(image, layer=replace(image.layer, hidden=c["img_mlp"])),
    )


def built(log_scale: float | None = None) -> tuple[VLModel, CLIP]:
    _, _, weights, _ = golden()
    model = VLModel(model_config())
    model.load_state_dict(from_flip(weights))
    objective = CLIP(CLIPConfig(bound="clip"))
    scale = weights["logit_scale"] if log_scale is None else torch.tensor(log_scale)
    objective.load_state_dict({"log_scale": scale.reshape(())})
    return model, objective


def batch() -> Batch:
    """Words between what a tokenizer adds, which the towers leave out."""
    c, _, _, known = golden()
    ids = torch.nn.functional.pad(known["in.txt"], (1, 1))
    length = torch.tensor(c["lens"]) + 2
    return Batch(image=known["in.image"].permute(0, 3, 1, 2), ids=ids, length=length, seed=torch.zeros_like(length))


def losses(model: VLModel, objective: CLIP, keep_BK: Tensor | None) -> dict[str, Loss]:
    return objective(model, model.encode_image(batch().image, keep_BK), batch())


def check(name: str, value: Tensor) -> None:
    _, tol, _, known = golden()
    assert_close(value, known[f"out.{name}"], tol[f"out.{name}"], name)


@pytest.mark.parametrize("way", ["mask50", "full"])
def test_embeddings_logits_and_loss(way):
    _, _, _, known = golden()
    model, objective = built()
    keep = known["out.mask50.ids_keep"] if way == "mask50" else None
    state = model.encode_image(batch().image, keep)
    if way == "mask50":
        check("mask50.img_tokens", state)
    image, text = objective.embed(model, state, batch())
    check(f"{way}.z_img", image)
    check(f"{way}.z_txt", text)
    check(f"{way}.tau", 1 / objective.scale()[None])
    check(f"{way}.logits", objective.scale() * image @ text.T)
    check(f"{way}.loss", combine(losses(model, objective, keep)))


def test_states_of_all_positions_of_a_text():
    model, _ = built()
    seen: list[Tensor] = []
    model.embed.text.norm.register_forward_hook(lambda *args: seen.append(args[2]))
    model.embed_text(batch().ids, batch().length)
    check("txt_tokens", seen[0])


def test_the_fixed_positions_are_theirs():
    _, _, weights, _ = golden()
    theirs = weights["img_encoder/posembed_encoder/pos_embedding"][0]
    assert_close(VLModel(model_config()).image.position, theirs, 1e-6, "positions")


@pytest.mark.parametrize(("way", "log_scale"), [("mask50", None), ("scale_over", 5.0)])
def test_gradients(way, log_scale):
    """Beyond its bound the temperature has none."""
    _, tol, _, known = golden()
    model, objective = built(log_scale)
    loss = combine(losses(model, objective, known["out.mask50.ids_keep"]))
    check(f"{way}.loss", loss)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    sources = flip_map(len(model.image.blocks), len(model.text.blocks)).sources
    owner = {part: (ours, parts) for ours, parts in sources.items() for part in parts}
    stored = {key.removeprefix(f"grad.{way}."): key for key in known if key.startswith(f"grad.{way}.")}
    for name, key in stored.items():
        if name == "logit_scale":
            mine = objective.log_scale.grad
        else:
            ours, parts = owner[name]
            mine = gradients[ours].chunk(len(parts))[parts.index(name)]
        assert_close(mine, from_flax({name: known[key]})[name], tol[key], key)
    assert stored


def test_what_is_left_over_is_named():
    _, _, weights, _ = golden()
    with pytest.raises(UserError, match=r"not laid out as FLIP.*left over .*img_encoder/more"):
        from_flip({**weights, "img_encoder/more/kernel": torch.zeros(1, 1)})
