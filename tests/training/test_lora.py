"""Low-rank adapters: what they train, what is saved, and that PEFT reads it."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvlp.errors import UserError
from fastvlp.model.lora import LoRAConfig, adapted_layers, add_adapters, merged_state
from fastvlp.model.saving import load_model
from fastvlp.training.checkpoint import save
from fastvlp.training.loop import start, steps, train
from fastvlp.training.trained_parts import LastLayers, part_sizes
from tests.installed import skip_without
from tests.training.runs import assert_equal, made_pairs, made_run, weights
from tests.training.test_freeze import buffers, conv_run

skip_without("peft", install="-e '.[lora]'")
RANK = LoRAConfig(rank=2, alpha=8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def test_at_the_start_adapters_change_nothing(pairs, tmp_path):
    """Whatever is drawn for them, the model is drawn alike."""
    run = made_run(pairs, tmp_path, "clip", "flm")
    plain, adapted = (start(one).model for one in (run, replace(run, lora=RANK)))
    assert_equal(plain.state_dict(), merged_state(adapted))
    batch = next(start(run).train.batches())[0]
    torch.testing.assert_close(adapted.encode_image(batch.image), plain.encode_image(batch.image), rtol=0, atol=0)


def test_adapters_are_trained_in_place_of_their_parts(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "clip", "flm", steps=3, lora=RANK))
    before = weights(state)
    list(steps(state))
    moved = {name for name, value in weights(state).items() if not torch.equal(value, before[name])}
    encoders = {name for name in moved if name.startswith(("model.image.", "model.text."))}
    assert encoders and all(".lora_" in name for name in encoders)
    # One block of each encoder: attention in and out, two layers of the MLP; and the embedding of patches.
    assert len(encoders) == 2 * (4 + 1 + 4)
    assert {"model.fusion.text_in.weight", "model.embed.image.out.weight"} <= moved
    sizes = part_sizes(state.model, state.pretraining.objectives)
    assert sizes["text"].trained == 2 * (32 + 96 + 32 + 32 + 32 + 64 + 64 + 32)
    assert sizes["fusion"].trained == sizes["fusion"].parameters


def test_a_saved_model_has_the_adapters_merged(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "run", "clip", steps=3, lora=RANK)
    state = train(run)
    saved = load_model(run.folder, "last").model
    batch = next(state.train.batches())[0]
    state.model.eval()
    assert not any(".lora_" in name for name in saved.state_dict())
    torch.testing.assert_close(
        saved.encode_image(batch.image), state.model.encode_image(batch.image), rtol=0, atol=1e-5
    )
    vectors = (model.embed_text(batch.ids, batch.length) for model in (saved, state.model))
    torch.testing.assert_close(*vectors, rtol=0, atol=1e-5)


def test_peft_adds_the_saved_adapters_to_the_model_that_they_were_trained_from(pairs, tmp_path):
    base = made_run(pairs, tmp_path / "base", "clip", steps=1)
    train(base)
    run = made_run(pairs, tmp_path / "run", "clip", steps=3, lora=RANK, init=str(base.folder))
    train(run)
    tuned, given = load_model(run.folder, "last").model, load_model(base.folder).model
    batch = next(start(base).train.batches())[0]
    folder = run.folder / "last-adapters"
    assert sorted(path.name for path in folder.iterdir()) == ["image", "text"]
    peft = importlib.import_module("peft")
    image = peft.PeftModel.from_pretrained(given.image, folder / "image").eval()
    torch.testing.assert_close(image(batch.image), tuned.image(batch.image), rtol=0, atol=1e-5)
    assert not torch.allclose(load_model(base.folder).model.image(batch.image), tuned.image(batch.image), atol=1e-3)
    text = peft.PeftModel.from_pretrained(given.text, folder / "text").merge_and_unload()
    assert_equal(text.state_dict(), tuned.text.state_dict(), 1e-6)
    config = json.loads((folder / "text" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 8, "LORA")
    assert config["base_model_name_or_path"] == str(base.folder)


def test_a_resumed_run_ends_as_an_uninterrupted_one(pairs, tmp_path):
    lora = replace(RANK, dropout=0.3)
    whole = made_run(pairs, tmp_path / "whole", "moco", "mlm", lora=lora, ema=0.5)
    half = replace(whole, out=str(tmp_path / "half"))
    stopped = start(half)
    for report in steps(stopped):
        if report.step == 3:
            break
    save(stopped)
    assert_equal(weights(train(half, resume=True)), weights(train(whole)))
    with pytest.raises(UserError, match=r"lora\.rank: 2 then, 4 now"):
        train(replace(half, steps=8, lora=replace(lora, rank=4)), resume=True)


def test_averaged_adapters_are_merged_too(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "run", "clip", steps=2, lora=RANK, ema=0.5)
    state = train(run)
    assert_equal(load_model(run.folder, "last").model.state_dict(), merged_state(state.ema.module.model), 0)


def test_parts_and_layers_are_chosen(pairs, tmp_path):
    def adapted(**changes) -> set[str]:
        lora = replace(RANK, **changes.pop("lora", {}))
        return {*adapted_layers(start(made_run(pairs, tmp_path, "clip", "flm", lora=lora, **changes)).model)}

    assert adapted(lora={"parts": ("text",), "targets": ("qkv", "attend.out")}) == {
        "text.blocks.0.attend.qkv",
        "text.blocks.0.attend.out",
    }
    assert all(name.startswith("fusion.blocks.") for name in adapted(lora={"parts": ("fusion.blocks",)}))
    # What is frozen otherwise gets none.
    assert all(name.startswith("image.") for name in adapted(freeze=("text",), lora={"parts": ("image",)}))
    last = adapted(train_last=LastLayers(image=1), lora={"parts": ("image",)})
    assert last and all(name.startswith("image.blocks.0.") for name in last)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoRAConfig(rank=2, parts=("words",))}, "`lora.parts`: the model has no words"),
        ({"lora": LoRAConfig(rank=2, targets=("qk",))}, "`lora.targets`: image has no linear layer"),
        ({"lora": RANK, "freeze": ("text",)}, "`lora.targets`: text has no linear layer that is trained"),
    ],
)
def test_what_gets_no_adapter_is_an_error(pairs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        start(made_run(pairs, tmp_path, "clip", **changes))


@pytest.mark.parametrize("changes", [{"rank": -1}, {"alpha": 0}, {"dropout": 1.0}])
def test_numbers_are_checked(changes):
    with pytest.raises(UserError, match=r"`lora\.rank`"):
        LoRAConfig(**{"rank": 2, **changes})


def test_a_single_stream_has_no_image_encoder_to_adapt(tmp_path):
    from tests.training.test_stored_training import family

    run = replace(
        family("single", tmp_path, tmp_path / "run"), freeze=(), lora=replace(RANK, parts=("single",)), steps=2
    )
    state = start(run)
    list(steps(state))
    assert all(name.startswith("single.") for name in adapted_layers(state.model))


def test_statistics_beside_adapters_stay(pairs, tmp_path):
    """A merged model has those of the model that it was trained from."""
    state = start(conv_run(pairs, tmp_path, "clip"))
    state.model.image.last = nn.Linear(2, 2)
    add_adapters(state.model, replace(RANK, parts=("image",)))
    state.pretraining.train()
    assert state.model.image.training
    before = buffers(state)
    state.model.image(torch.zeros(2, 3, 16, 16))
    for name, buffer in buffers(state).items():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_without_peft_the_remedy_is_named(pairs, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[lora\]'"):
        start(made_run(pairs, tmp_path, "clip", lora=RANK))
    start(made_run(pairs, tmp_path, "clip"))
