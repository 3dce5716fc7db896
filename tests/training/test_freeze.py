"""Parts of a model that stay as they are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fastvlp.data.state_store import StatesConfig
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoder, ImageEncoderConfig
from fastvlp.model.freezing import evaluating
from fastvlp.training.flops import Flops
from fastvlp.training.loop import start, steps, train
from fastvlp.training.optim import OptimConfig, parameter_groups
from fastvlp.training.train_config import TrainConfig
from fastvlp.training.trained_parts import LastLayers
from tests.training.runs import made_pairs, made_run, weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def test_frozen_parts_stay_and_the_others_move(pairs, tmp_path):
    state = start(
        made_run(pairs, tmp_path, "clip", steps=2, freeze=("image.patch", "text.word.weight", "text.blocks.0"))
    )
    before = weights(state)
    list(steps(state))
    moved = {name for name, value in weights(state).items() if not torch.equal(value, before[name])}
    still = {
        name for name in before if name.startswith(("model.image.patch.", "model.text.word.", "model.text.blocks.0."))
    }
    assert still and not moved & still
    assert {"model.image.blocks.0.mlp_in.weight", "model.text.position.weight", "model.embed.image.out.weight"} <= moved
    trained = {id(p) for group in state.optimiser.param_groups for p in group["params"]}
    assert trained == {id(p) for p in state.pretraining.parameters() if p.requires_grad}


def test_a_name_is_of_a_whole_part(pairs, tmp_path):
    with pytest.raises(UserError, match=r"no text\.block; it has image, text, .*text\.blocks\.0"):
        start(made_run(pairs, tmp_path, "clip", freeze=("text.block",)))


def test_nothing_left_to_train_is_said(pairs, tmp_path):
    with pytest.raises(UserError, match="nothing is left to train"):
        start(made_run(pairs, tmp_path, "mlm", freeze=("image", "text", "fusion", "head", "reconstructor")))


def test_a_resumed_run_stays_frozen(pairs, tmp_path):
    run = made_run(pairs, tmp_path, "mlm", steps=2, freeze=("image",))
    train(run)
    with pytest.raises(UserError, match=r"freeze: \['image'\] then"):
        train(made_run(pairs, tmp_path, "mlm", steps=4), resume=True)
    state = train(made_run(pairs, tmp_path, "mlm", steps=4, freeze=("image",)), resume=True)
    assert not any(p.requires_grad for p in state.model.image.parameters())


@dataclass(frozen=True, kw_only=True)
class NormedConvConfig(ImageEncoderConfig):
    """A CNN with batch norms and dropout."""

    width: int = 32
    grid: int = 2

    def build(self) -> NormedConv:
        return NormedConv(self)


class NormedConv(ImageEncoder):
    def __init__(self, config: NormedConvConfig):
        super().__init__(config)
        layer = lambda n: nn.Sequential(nn.Conv2d(n, 32, 4, 4), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout())  # noqa: E731
        self.stages = nn.ModuleList([layer(3), nn.Sequential(nn.Conv2d(32, 32, 2, 2), nn.BatchNorm2d(32))])

    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        x = self.normalised(image)
        for stage in self.stages:
            x = stage(x)
        return x.flatten(2).transpose(1, 2)


def conv_run(pairs, out, *objectives: str, **changes) -> TrainConfig:
    run = made_run(pairs, out, *objectives, **changes)
    return replace(run, model=replace(run.model, image=NormedConvConfig(size=16)))


def buffers(state) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in state.model.image.named_buffers()}


@pytest.mark.parametrize("objective", ["clip", "moco", "mlm"])
def test_a_frozen_cnn_has_neither_dropout_nor_moving_statistics(pairs, tmp_path, objective):
    state = start(conv_run(pairs, tmp_path, objective, steps=3, freeze=("image",)))
    state.pretraining.train()
    assert state.pretraining.training and not any(module.training for module in state.model.image.modules())
    before = buffers(state)
    batch = next(state.train.batches())[0]
    first = state.model.encode_image(batch.image)
    list(steps(state))
    for name, buffer in buffers(state).items():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    with evaluating(state.model):
        pass
    torch.testing.assert_close(state.model.encode_image(batch.image), first, rtol=0, atol=0)
    if objective == "moco":
        slow = state.pretraining.objectives["moco"].slow
        torch.testing.assert_close(slow.encode_image(batch.image), first, rtol=0, atol=0)


def test_a_cnn_that_is_trained_moves_its_statistics(pairs, tmp_path):
    state = start(conv_run(pairs, tmp_path, "clip", steps=1))
    before = buffers(state)
    list(steps(state))
    assert not torch.equal(buffers(state)["stages.0.1.running_mean"], before["stages.0.1.running_mean"])


def test_the_last_layers_alone_are_trained(pairs, tmp_path):
    run = made_run(pairs, tmp_path, "clip", steps=2, train_last=LastLayers(text=1, image=0))
    run = replace(run, model=replace(run.model, text=replace(run.model.text, depth=3, last_norm=True)))
    state = start(run)
    before = weights(state)
    list(steps(state))
    moved = {name for name, value in weights(state).items() if not torch.equal(value, before[name])}
    text = {name.removeprefix("model.text.") for name in moved if name.startswith("model.text.")}
    assert text and all(name.startswith(("blocks.2.", "last_norm.")) for name in text)
    assert not any(name.startswith("model.image.") for name in moved) and "model.embed.image.out.weight" in moved
    assert [state.model.text.drop.training, *(block.training for block in state.model.text.blocks)] == [False] * 3 + [
        True
    ]


def test_only_the_last_stage_of_a_cnn_moves_its_statistics(pairs, tmp_path):
    state = start(conv_run(pairs, tmp_path, "clip", steps=2, train_last=LastLayers(image=1)))
    before = buffers(state)
    list(steps(state))
    moved = {name for name, buffer in buffers(state).items() if not torch.equal(buffer, before[name])}
    assert moved and all(name.startswith("stages.1.") for name in moved)


@pytest.mark.parametrize(("count", "message"), [(3, "has 1 layers; give 0 to 1"), (-1, "give 0 to 1")])
def test_so_many_layers_must_exist(pairs, tmp_path, count, message):
    with pytest.raises(UserError, match=rf"`train_last\.text` {count}: .*{message}"):
        start(made_run(pairs, tmp_path, "clip", train_last=LastLayers(text=count)))


def test_each_layer_learns_at_a_share_of_the_next_ones_rate(pairs, tmp_path):
    run = made_run(pairs, tmp_path, "clip")
    run = replace(run, model=replace(run.model, text=replace(run.model.text, depth=2, last_norm=True)))
    state = start(run)
    optim = OptimConfig(lr=1.0, layer_decay=0.5, cross_multiplier=3, head_multiplier=7)
    rate = {id(p): group["base_lr"] for group in parameter_groups(state.pretraining, optim) for p in group["params"]}
    text, image = state.model.text, state.model.image
    assert rate[id(text.last_norm.weight)] == rate[id(image.norm.weight)] == 1
    assert rate[id(text.blocks[1].mlp_in.weight)] == rate[id(image.blocks[0].mlp_in.weight)] == 0.5
    assert rate[id(text.blocks[0].mlp_in.weight)] == rate[id(image.patch.weight)] == rate[id(image.position)] == 0.25
    assert rate[id(text.word.weight)] == rate[id(text.norm.weight)] == 0.125
    assert rate[id(state.model.fusion.text_in.weight)] == 3 and rate[id(state.model.embed.image.out.weight)] == 1


def test_the_start_counts_what_is_trained(pairs, tmp_path):
    train(made_run(pairs, tmp_path, "clip", steps=1, freeze=("image",), train_last=LastLayers(text=1)))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (parts,) = [line["parts"] for line in lines if line["kind"] == "parameters"]
    assert parts["image"]["trained"] == 0 < parts["image"]["parameters"]
    assert 0 < parts["text"]["trained"] < parts["text"]["parameters"]
    assert parts["embed"]["trained"] == parts["embed"]["parameters"] and parts["objective clip"]["trained"] == 1


def test_only_what_is_computed_counts(pairs, tmp_path):
    """A frozen encoder has no backward pass, and stored states have no forward pass either."""
    changes = {"trained": {}, "frozen": {"freeze": ("image",)}, "stored": {"freeze": ("image",)}}
    flops = {}
    for name, change in changes.items():
        store = "always" if name == "stored" else "never"
        states = StatesConfig(store=store, folder=str(tmp_path / "states"))
        state = start(made_run(pairs, tmp_path, "clip", steps=1, states=states, **change))
        (report,) = steps(state)
        flops[name] = report.flops
        with Flops() as forward, torch.no_grad():
            state.model.image(torch.zeros(8, 3, 16, 16))
    # The embedding of patches needs no gradient of the pixels, and the head of a frozen encoder none of its states.
    own = forward.total
    embedding, head = 2 * 8 * 4 * (3 * 8 * 8) * 32, 2 * 8 * 32 * 16
    assert flops["frozen"] - flops["stored"] == own
    assert flops["trained"] - flops["frozen"] == 2 * own - embedding + head
