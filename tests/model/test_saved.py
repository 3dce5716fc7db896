"""Saved models: everything is named, nothing is left over."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.encoders.vit import resize_positions
from fastvlp.model.model import VLModel
from fastvlp.model.saving import inherit, load_exactly, load_model, save_model
from fastvlp.model.sizes import small, tiny, with_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red cube", "a blue ball"] * 3, vocab_size=60)


def made(tokenizer, seed=0, separate_heads=False, **size) -> VLModel:
    torch.manual_seed(seed)
    return VLModel(replace(with_tokenizer(tiny(**size), tokenizer), separate_heads=separate_heads))


def assert_equal(model, other):
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_round_trip(tmp_path, tokenizer):
    model, weight = made(tokenizer), torch.randn(2, 3)
    save_model(tmp_path, model, tokenizer, {"reading": "flm", "step": 7}, objectives={"itm.weight": weight})
    saved = load_model(tmp_path)
    assert saved.model.config == model.config
    assert_equal(model, saved.model)
    assert saved.info == {"reading": "flm", "step": 7}
    assert saved.tokenizer.vocab_size == tokenizer.vocab_size
    assert torch.equal(saved.objectives["itm.weight"], weight)
    assert torch.equal(saved.learned("itm")["weight"], weight) and not saved.learned("it")
    assert not saved.model.training
    assert not list(tmp_path.glob("*.tmp"))


def test_encoders_are_saved_by_type_and_read_without_it(tmp_path, tokenizer):
    model = made(tokenizer)
    save_model(tmp_path, model, tokenizer, {})
    path = tmp_path / "model.json"
    described = json.loads(path.read_text())
    del described["checksum"]  # as in files of earlier versions
    types = [described["config"][part].pop("type") for part in ("image", "text")]
    assert types == ["ViTConfig", "TextTransformerConfig"]
    path.write_text(json.dumps(described))
    assert load_model(tmp_path).model.config == model.config
    described["config"]["text"]["type"] = "MyConfig"
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"model\.json: MyConfig.*import_file"):
        load_model(tmp_path)


def test_best_and_last_have_a_step_each(tmp_path, tokenizer):
    model = made(tokenizer)
    save_model(tmp_path, model, tokenizer, {"step": 10}, name="best")
    save_model(tmp_path, model, tokenizer, {"step": 20}, name="last")
    assert load_model(tmp_path).info["step"] == 10
    assert load_model(tmp_path, "last").info["step"] == 20
    (tmp_path / "best.safetensors").unlink()
    assert load_model(tmp_path, "best").weights.name == "last.safetensors"


def test_what_is_no_saved_model_is_refused_by_name(tmp_path, tokenizer):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(tmp_path)
    save_model(tmp_path, made(tokenizer), tokenizer, {})
    weights, described = tmp_path / "model.safetensors", tmp_path / "model.json"
    whole, text = weights.read_bytes(), described.read_text()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no weights here"):
        load_model(tmp_path)
    weights.write_bytes(whole)

    newer = json.loads(text) | {"format": 99}
    described.write_text(json.dumps(newer))
    with pytest.raises(UserError, match="newer fastvlp"):
        load_model(tmp_path)
    for damaged in ("{", "[]", '{"format": 1}', text.replace('"patch"', '"pach"'), text.replace('"pre"', '"prae"')):
        described.write_text(damaged)
        with pytest.raises(UserError, match=r"model\.json"):
            load_model(tmp_path)


def test_weights_of_another_model_are_named(tmp_path, tokenizer):
    save_model(tmp_path / "a", made(tokenizer), tokenizer, {})
    save_model(tmp_path / "b", made(tokenizer, reconstructor=False), tokenizer, {})
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks reconstructor\..* and \d+ more"):
        load_model(tmp_path / "a")


def test_inherit_names_every_parameter(tokenizer):
    source = made(tokenizer, reconstructor=False)
    target = made(tokenizer, seed=1, size=96, separate_heads=True)
    positions = resize_positions(source.image.position.detach(), 12, 1)
    fresh = {
        n: v.clone() for n, v in target.state_dict().items() if n.startswith(("reconstructor.", "forward_", "reverse_"))
    }
    result = inherit(target, source.state_dict())
    assert result.resized == ["image.position"]
    assert set(result.fresh) == set(fresh)
    assert not result.dropped
    assert set(result.loaded + result.resized + result.fresh) == set(target.state_dict())
    assert torch.equal(target.image.position, positions)
    after = target.state_dict()
    assert all(torch.equal(after[name], value) for name, value in fresh.items())
    assert all(torch.equal(after[name], source.state_dict()[name]) for name in result.loaded)


def test_inherit_drops_only_whole_modules(tokenizer):
    source, target = made(tokenizer), made(tokenizer, seed=1, reconstructor=False)
    result = inherit(target, source.state_dict())
    assert result.dropped and all(name.startswith("reconstructor.") for name in result.dropped)
    assert_equal(target, source)

    state = dict(source.state_dict())
    state.pop("reconstructor.bottom.0.cross.kv.weight")
    with pytest.raises(UserError, match=r"has no reconstructor\.bottom\.0\.cross\.kv\.weight"):
        inherit(made(tokenizer), state)
    with pytest.raises(UserError, match="stray"):
        inherit(made(tokenizer), source.state_dict() | {"stray": torch.zeros(1)})


def test_another_width_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"has shape .*, the model wants .*"):
        inherit(VLModel(with_tokenizer(small(size=48, patch=8), tokenizer)), made(tokenizer).state_dict())
    other = made(tokenizer, size=96).state_dict()
    with pytest.raises(UserError, match=r"image\.position has shape .*"):
        load_exactly(made(tokenizer), other, "here")


def test_both_shapes_are_named_where_they_differ(tokenizer):
    other = Tokenizer.train(["a green cone on a table with many other things"] * 3, vocab_size=90)
    with pytest.raises(
        UserError, match=r"text\.word\.weight has shape \[\d+, (\d+)\], the model wants \[\d+, \1\].*tokenizer"
    ):
        inherit(made(other), made(tokenizer).state_dict())
