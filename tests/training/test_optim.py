from __future__ import annotations

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import two_towers
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.moco import albef
from fastvlp.objectives.region import MRFRConfig
from fastvlp.objectives.siglip import SigLIPConfig
from fastvlp.training.optim import OptimConfig, build_optimiser, flip_optim, parameter_groups, rate_factor, set_rate
from fastvlp.training.pretraining import Pretraining
from tests.made import made_config, made_model, made_tokenizer
from tests.made_single import single_model


def test_groups_follow_the_module_and_leave_no_parameter_out():
    model = made_model(separate_heads=True)
    pretraining = Pretraining(model, {"itm": ITMConfig().build(made_config(), made_tokenizer())})
    groups = parameter_groups(pretraining, OptimConfig(lr=1.0, cross_multiplier=3, head_multiplier=7))
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(settings) == len(list(pretraining.parameters()))
    assert settings[id(model.image.patch.weight)] == (1, 0.01)
    assert settings[id(model.image.patch.bias)] == (1, 0)
    assert settings[id(model.text.norm.weight)] == (1, 0)
    assert settings[id(model.fusion.text_in.weight)] == (3, 0.01)
    assert settings[id(model.reconstructor.query_type)] == (3, 0)
    assert settings[id(model.reverse_head.vocabulary.weight)] == (7, 0.01)
    assert settings[id(pretraining.objectives["itm"].match.bias)] == (7, 0)


@pytest.mark.parametrize("config", [CLIPConfig(), SigLIPConfig(), albef(queue=8)])
def test_temperature_and_bias_learn_as_fast_as_the_encoders(config):
    model = VLModel(two_towers(made_config()))
    pretraining = Pretraining(model, {"pairs": config.build(model.config, made_tokenizer())})
    groups = parameter_groups(pretraining, OptimConfig(lr=1.0, head_multiplier=7))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    learned = [p for p in pretraining.objectives.parameters() if p.requires_grad]
    assert learned and all(rate[id(parameter)] == 1 for parameter in learned)


def test_the_heads_of_a_single_stream_and_what_objectives_own_learn_faster():
    model = single_model()
    pretraining = Pretraining(model, {"mrfr": MRFRConfig().build(model.config, made_tokenizer())})
    groups = parameter_groups(pretraining, OptimConfig(lr=1.0, head_multiplier=7))
    rate = {
        name: group["lr"]
        for group in groups
        for p in group["params"]
        for name, q in pretraining.named_parameters()
        if p is q
    }
    heads = {name for name, value in rate.items() if value == 7}
    assert heads == {
        name for name in rate if name.startswith(("model.single.words.", "model.single.match.", "objectives."))
    }
    assert len(heads) > 6 and {value for name, value in rate.items() if name not in heads} == {1}


def test_a_part_has_a_rate_of_its_own():
    """Times what it would have otherwise: by its place in an encoder, as fusion, or as a head."""
    model = made_model()
    pretraining = Pretraining(model, {"itm": ITMConfig().build(made_config(), made_tokenizer())})
    parts = {"image": 0.1, "text.word": 10.0, "text.blocks.0": 2.0, "objectives.itm.pool": 0.5}
    optim = OptimConfig(lr=1.0, cross_multiplier=3, head_multiplier=8, layer_decay=0.5, parts=parts)
    rate = {id(p): group["lr"] for group in parameter_groups(pretraining, optim) for p in group["params"]}
    assert len(rate) == len(list(pretraining.parameters()))
    assert rate[id(model.image.norm.weight)] == pytest.approx(0.1)
    assert rate[id(model.image.patch.weight)] == pytest.approx(0.1 * 0.5**2)
    assert rate[id(model.text.word.weight)] == pytest.approx(10 * 0.5**3)
    assert rate[id(model.text.blocks[0].mlp_in.weight)] == pytest.approx(2 * 0.5**2)
    assert rate[id(model.text.blocks[1].mlp_in.weight)] == pytest.approx(0.5)
    assert rate[id(model.fusion.text_in.weight)] == 3
    own = pretraining.objectives["itm"]
    assert rate[id(own.pool.weight)] == 4 and rate[id(own.match.weight)] == 8
    with pytest.raises(UserError, match=r"`optim.parts`: there is no txt; there are image, .*objectives\.itm"):
        parameter_groups(pretraining, OptimConfig(lr=1.0, parts={"txt": 2.0}))
    with pytest.raises(UserError, match=r"`optim\.parts`"):
        OptimConfig(lr=1.0, parts={"text": 0.0})


def test_flip_spares_positions_and_decays_class_token_and_temperature():
    model = VLModel(two_towers(made_config()))
    pretraining = Pretraining(model, {"clip": CLIPConfig().build(model.config, made_tokenizer())})
    groups = parameter_groups(pretraining, flip_optim(256))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    still = (model.text.position.weight, model.image.position, model.image.patch.bias, model.embed.text.norm.weight)
    assert {decay[id(p)] for p in still} == {0}
    moving = (model.image.class_token, model.text.word.weight, pretraining.objectives["clip"].log_scale)
    assert {decay[id(p)] for p in moving} == {0.2}
    assert {group["lr"] for group in groups} == {4e-6}


@pytest.mark.parametrize(
    ("base", "batch", "lr"),
    [
        (4e-6, 2**14, 2.56e-4),
        (4e-6, 2**15, 5.12e-4),
        (4e-6, 2**16, 1.024e-3),
        (2e-6, 2**16, 5.12e-4),
        (4e-8, 2**16, 1.024e-5),
    ],
)
def test_the_rate_follows_the_batch(base, batch, lr):
    """FLIP, Table 10 and section A.1."""
    run = flip_optim(batch, base=base)
    assert run.lr == pytest.approx(lr, rel=1e-12)
    assert (run.betas, run.eps, run.weight_decay, run.clip, run.decay) == ((0.9, 0.95), 1e-8, 0.2, None, "cosine")


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_the_rate_warms_up_and_decays(decay):
    end = 1.0 if decay == "constant" else 0.0
    assert rate_factor(0.0, 0.1, decay) == 0
    assert rate_factor(0.05, 0.1, decay) == 0.5
    assert rate_factor(0.1, 0.1, decay) == 1
    assert rate_factor(1.0, 0.1, decay) == pytest.approx(end)
    assert rate_factor(1.7, 0.1, decay) == pytest.approx(end)
    assert rate_factor(0.55, 0.1, "linear") == pytest.approx(0.5)


def test_muon_updates_the_matrices_of_layers_alone():
    torch.manual_seed(0)
    model = made_model()
    pretraining = Pretraining(model, {"mlm": MLMConfig().build(model.config, made_tokenizer())})
    optimiser = build_optimiser(pretraining, OptimConfig(lr=0.1, weight_decay=0, cross_multiplier=3, matrices="muon"))
    muon = {id(p) for group in optimiser.param_groups if group["muon"] for p in group["params"]}
    every = [p for group in optimiser.param_groups for p in group["params"]]
    assert len({id(p) for p in every}) == len(every) == len(list(pretraining.parameters()))
    block = model.fusion.blocks[0]
    assert {id(block.mlp_in.weight), id(block.attend.qkv.weight)} <= muon
    others = (block.mlp_in.bias, model.text.word.weight, model.head.vocabulary.weight, model.image.patch.weight)
    assert not {id(p) for p in others} & muon
    before = {name: p.detach().clone() for name, p in pretraining.named_parameters()}
    for p in every:
        p.grad = torch.randn_like(p)
    set_rate(optimiser, 0.5)
    optimiser.step()
    # An orthogonal update of the size of AdamW's: 0.2 times the root of the larger side, at the group's rate.
    change = before["model.fusion.blocks.0.mlp_in.weight"] - block.mlp_in.weight
    singular = torch.linalg.svdvals(change) / (0.5 * 0.1 * 3 * 0.2 * max(change.shape) ** 0.5)
    assert singular.min() > 0.5 and singular.max() < 1.5
    # AdamW's first step is the rate, whatever the gradient.
    step = (before["model.text.word.weight"] - model.text.word.weight).abs()
    assert step.max().item() == pytest.approx(0.05, rel=1e-3)


def test_a_resumed_muon_goes_on_as_it_would_have():
    def run(steps: int, resume_at: int | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = made_model()
        pretraining = Pretraining(model, {"mlm": MLMConfig().build(model.config, made_tokenizer())})
        config = OptimConfig(lr=0.01, matrices="muon")
        optimiser = build_optimiser(pretraining, config)
        for step in range(steps):
            if step == resume_at:
                saved, optimiser = optimiser.state_dict(), build_optimiser(pretraining, config)
                optimiser.load_state_dict(saved)
            random = torch.Generator().manual_seed(step)
            for p in pretraining.parameters():
                p.grad = torch.randn(p.shape, generator=random)
            optimiser.step()
        return [p.detach() for p in pretraining.parameters()]

    for whole, resumed in zip(run(3), run(3, resume_at=2)):
        assert torch.equal(whole, resumed)


def test_muon_without_a_layer_to_train_is_refused():
    model = made_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    pretraining = Pretraining(model, {"mlm": MLMConfig().build(model.config, made_tokenizer())})
    with pytest.raises(UserError, match="muon"):
        build_optimiser(pretraining, OptimConfig(lr=1.0, matrices="muon"))
