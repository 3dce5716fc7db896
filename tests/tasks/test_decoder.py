"""Two encoders that share a joint space alone answer questions and write captions by a small decoder on the image's states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.data.pairs import PairData
from fastvlp.data.state_store import StatesConfig
from fastvlp.errors import UserError
from fastvlp.model.fusion import FusionConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import VLModel
from fastvlp.model.saving import load_model
from fastvlp.model.sizes import two_towers
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.tasks.caption import CaptionTask
from fastvlp.tasks.decoder import DecoderConfig
from fastvlp.tasks.generation import greedy
from fastvlp.tasks.task_evaluation import evaluate_task
from fastvlp.tasks.vqa import VQATask
from fastvlp.training.loop import start, train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig
from tests.made import made_batch, made_config, small_model
from tests.tasks.test_decode import uncached
from tests.tasks.tuning import planned, tune

SMALL = DecoderConfig(text="new", layers=2, image_layers=1, width=32)


@pytest.fixture(scope="module")
def towers(world, tmp_path_factory):
    """Folder of a run of clip: an image and a text encoder."""
    folder = tmp_path_factory.mktemp("towers") / "clip"
    train(
        TrainConfig(
            name="clip",
            out=str(folder),
            data=PairData(train=str(world / "train"), batch_size=8, max_length=40),
            model=two_towers(small_model()),
            objectives={"clip": CLIPConfig()},
            optim=OptimConfig(lr=1e-3),
            steps=2,
            vocab=400,
            precision="fp32",
        )
    )
    return folder


def test_a_captioner_is_that_of_flip(towers, world, tmp_path):
    """A linear layer to 384, three layers over the image, three that read it, and words of its own (A.6)."""
    run, source = planned("caption", towers, world, tmp_path / "run"), load_model(towers).model.config
    layer = LayerConfig(width=384, heads=6, hidden=1536)
    assert run.model.fusion == FusionConfig(depth=3, image_depth=3, layer=layer)
    assert run.model.image == source.image and run.model.embed is None
    assert (run.model.text.depth, run.model.text.width) == (0, 384)
    assert (
        run.data.max_length == 50 and planned("caption", towers, world, tmp_path, max_length=90).data.max_length == 90
    )


def test_questions_are_read_by_the_text_encoder_as_in_pretraining(towers, world, tmp_path):
    run, source = planned("vqa", towers, world, tmp_path / "run"), load_model(towers).model.config
    assert (run.model.image, run.model.text) == (source.image, source.text)
    assert (run.model.fusion.depth, run.model.fusion.layer.width) == (4, source.text.width)
    assert run.objectives["vqa"].reading == "causal", "as clip reads"
    new = planned("vqa", towers, world, tmp_path / "run", decoder=SMALL)
    assert new.model.text.depth == 0 and new.model.fusion.layer.width == 32 and new.objectives["vqa"].reading == "full"


def test_encoders_learn_a_tenth_as_fast_as_what_is_new(towers, world, tmp_path):
    for task, usual in ((VQATask(), 5), (CaptionTask(), 1)):
        optim = planned(task, towers, world, tmp_path / "run").optim
        assert optim.lr == pytest.approx(5e-5) and optim.lr * optim.cross_multiplier == pytest.approx(5e-4)
        assert optim.lr * optim.head_multiplier == pytest.approx(usual * 5e-4)
        assert optim.parts == ({"text": 10} if usual == 1 else {}), "new words, or the text encoder"
    optim = planned("caption", towers, world, tmp_path / "run", optim=replace(CaptionTask.optim, warmup=0.3)).optim
    assert optim.lr == pytest.approx(5e-5) and optim.warmup == 0.3
    given = OptimConfig(lr=1e-5, cross_multiplier=3)
    assert planned("caption", towers, world, tmp_path / "run", optim=given).optim == given


def test_layers_over_the_image_change_what_texts_read_and_decoding_agrees():
    config = made_config(reconstructor=False)
    config = replace(config, fusion=replace(config.fusion, image_depth=2))
    torch.manual_seed(0)
    model = VLModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image_BKD = model.encode_image(made_batch(lengths=(4, 4, 4)).image).detach()
    assert greedy(model, image_BKD, 12).equal(uncached(model, image_BKD, 12))
    with torch.no_grad():
        x = model.fusion.image_in(image_BKD) + model.fusion.image_type[0]
        for block in model.fusion.image_blocks:
            x = block(x)
        torch.testing.assert_close(model.fusion.image_memory(image_BKD, None), model.fusion.image_norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_stored_states_of_a_frozen_encoder_are_read(towers, world, tmp_path, task):
    """Trained, saved, loaded by an evaluation, and continued."""
    given = {"freeze": ("image",), "steps": 4, "states": StatesConfig(folder=str(tmp_path / "states"), store="always")}
    given |= {"decoder": SMALL} if task == "caption" else {}
    scores, _ = tune(task, towers, world, tmp_path / "run", **given)
    assert [*(tmp_path / "states").iterdir()], "the images' states are on disk"
    assert evaluate_task(tmp_path / "run").scores == {"test": scores["test"]}
    before, after = load_model(towers).model.state_dict(), load_model(tmp_path / "run").model.state_dict()
    kept = [name for name in before if name.startswith("image.")]
    assert kept and all(before[name].equal(after[name]) for name in kept)
    text = [name for name in after if name.startswith("text.")]
    assert any("blocks" in name for name in text) == (task == "vqa")
    if task == "caption":
        written = evaluate_task(tmp_path / "run", beams=3).scores["test"]
        assert len(written["captions"]) == 6 and written["decoding"]["beams"] == 3
    tune(task, towers, world, tmp_path / "run", **given | {"steps": 6}, resume=True)
    assert load_model(tmp_path / "run", "last").info["step"] == 6


def test_every_weight_is_accounted_for(towers, world, tmp_path):
    state = start(planned("caption", towers, world, tmp_path / "run", decoder=SMALL))
    inherited, own = state.inherited, load_model(towers).model.state_dict()
    assert inherited.loaded == [name for name in own if name.startswith("image.")] and not inherited.resized
    assert inherited.dropped == [name for name in own if name.startswith("embed.")]
    assert {name.partition(".")[0] for name in inherited.fresh} == {"text", "fusion", "head"}
    rates = {id(p): group["base_lr"] for group in state.optimiser.param_groups for p in group["params"]}
    model = state.model
    new = (
        model.text.word.weight,
        model.fusion.image_in.weight,
        model.fusion.image_blocks[0].mlp_in.weight,
        model.head.norm.weight,
    )
    assert {round(rates[id(p)], 9) for p in new} == {5e-4} and rates[id(model.image.patch.weight)] == pytest.approx(
        5e-5
    )


def test_what_cannot_be_is_named(runs, towers, world, tmp_path):
    with pytest.raises(UserError, match="`decoder` is only for"):
        planned("caption", runs["flm"], world, tmp_path / "run", decoder=SMALL)
    with pytest.raises(UserError, match=r"`decoder\.layers` 0"):
        DecoderConfig(layers=0)
    with pytest.raises(UserError, match="single stream over words"):
        planned("caption", runs["uniter"], world, tmp_path / "run")
