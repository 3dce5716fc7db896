"""FLIP as specified: sizes, kept tokens, costs, and what masking may and may not change (arXiv 2212.00794)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from fastvlp.data.augment import AugmentConfig
from fastvlp.model import sizes
from fastvlp.model.keep import random_keep
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.objective import combine
from fastvlp.objectives.siglip import SigLIPConfig
from fastvlp.recipes import recipe
from fastvlp.training.flops import Flops
from fastvlp.training.loop import start, steps, train
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.train_config import TrainConfig
from tests.made import SPECIALS, VOCAB, made_batch, made_tokenizer
from tests.training.runs import assert_equal, made_pairs, made_run, weights

FLIP = {"b16": sizes.flip_b16_published, "l16": sizes.flip_l16_published, "h14": sizes.flip_h14_published}


def with_vocabulary(config: ModelConfig, vocab: int) -> ModelConfig:
    return replace(config, text=replace(config.text, vocab=vocab, **SPECIALS))


def parameters(config: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = VLModel(config)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


@pytest.mark.parametrize(("size", "image", "text"), [("b16", 85.6, 53.5), ("l16", 303.1, 108.5), ("h14", 630.4, 333.6)])
def test_sizes(size, image, text):
    """In millions, rebuilt from the released code's parts; the paper rounds them to 86/53, 303/109 and 631/334."""
    found = parameters(with_vocabulary(FLIP[size](), 30523))
    assert found["image"] / 1e6 == pytest.approx(image, rel=0.005)
    assert found["text"] / 1e6 == pytest.approx(text, rel=0.005)


def test_clips_sizes_are_openais_to_the_last_parameter():
    """Less the temperature, which is the objective's here."""
    known = {sizes.clip_b32: 151_277_313, sizes.clip_b16: 149_620_737, sizes.clip_l14: 427_616_513}
    for size, count in known.items():
        assert sum(parameters(with_vocabulary(size(), 49408)).values()) == count - 1


@pytest.mark.parametrize(
    ("size", "share", "kept"), [("l16", 0.5, 98), ("l16", 0.25, 49), ("h14", 0.5, 128), ("h14", 0.25, 64)]
)
def test_kept_tokens(size, share, kept):
    grid = FLIP[size]().image.grid
    assert random_keep(torch.arange(2), grid**2, share).shape[1] == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "text", "half", "quarter"),
    [("b16", 0.069, 0.53, 0.30), ("l16", 0.044, 0.52, 0.28), ("h14", 0.058, 0.52, 0.29)],
)
def test_costs(size, text, half, quarter):
    """Costs of the whole model as shares of the cost without masking (Table 1a: 0.52 and 0.28 for L/16), and of the text tower
    beside the whole image."""
    config = FLIP[size]()
    assert config.embed.positions(34) == 32
    with torch.device("meta"):
        image, encoder = torch.empty(1, 3, config.image.size, config.image.size), config.image.build()
        words = forward_flops(lambda: config.text.build()(torch.zeros(1, 32, dtype=torch.int64), torch.arange(32)))
    kept = (config.image.random_patches(torch.zeros(1, dtype=torch.int64), keep) for keep in (1.0, 0.5, 0.25))
    whole, *masked = (forward_flops(lambda keep_BK=rows: encoder(image, to_meta(keep_BK))) for rows in kept)
    assert round(words / whole, 3) == text
    assert [round((part + words) / (whole + words), 2) for part in masked] == [half, quarter]


def to_meta(keep_BK: Tensor | None) -> Tensor | None:
    return None if keep_BK is None else keep_BK.to("meta")


def forward_flops(compute: Callable[[], Any]) -> int:
    with torch.no_grad(), Flops() as flops:
        compute()
    return flops.total


def flip_pretraining(keep: float = 1.0) -> Pretraining:
    torch.manual_seed(0)
    config = with_vocabulary(sizes.flip_tiny_published(size=32), VOCAB)
    return Pretraining(VLModel(config), {"clip": CLIPConfig(bound="clip").build(config, made_tokenizer())}, keep)


def test_evaluation_draws_nothing():
    model, batch = flip_pretraining(0.5).model.eval(), made_batch(lengths=(5, 9), size=32)
    with torch.random.fork_rng():
        vectors = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            vectors.append(
                torch.cat(
                    [model.embed_image(model.encode_image(batch.image)), model.embed_text(batch.ids, batch.length)]
                )
            )
    assert torch.equal(*vectors)


def test_without_masking_training_equals_evaluation():
    module, batch = flip_pretraining(), made_batch(lengths=(5, 9), size=32)
    model = module.model
    known = model.eval().embed_image(model.encode_image(batch.image))
    module.train()
    assert torch.equal(model.embed_image(module.encode_image(batch)), known)
    assert torch.equal(model.embed_image(module.encode_image(replace(batch, seed=batch.seed + 1))), known)


def test_a_row_is_masked_by_its_seed_alone():
    module, batch = flip_pretraining(0.5), made_batch(lengths=(5, 9, 7), size=32)
    states = module.encode_image(batch)
    assert states.shape == (3, 9, 96)
    alone = _pytree.tree_map_only(torch.Tensor, lambda x: x[1:2], batch)
    torch.testing.assert_close(module.encode_image(alone), states[1:2])
    assert not torch.allclose(module.encode_image(replace(batch, seed=batch.seed + 1)), states)


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_every_patch_is_kept_equally_often(share):
    """Chi-square over 49 patches; 48 degrees of freedom, so 85 is met by chance once in a thousand. Rows are drawn
    without replacement, which makes the sum smaller by 1 - K/N."""
    rows, N = 20_000, 49
    keep = random_keep(torch.arange(rows) * 7919 + 3, N, share)
    count = keep.flatten().bincount(minlength=N).double()
    expected = rows * keep.shape[1] / N
    assert ((count - expected).square() / expected).sum() / (1 - keep.shape[1] / N) < 85


def test_pairs_of_patches_are_kept_independently():
    rows, N, K = 20_000, 16, 8
    mask = torch.zeros(rows, N).scatter(1, random_keep(torch.arange(rows) * 7919 + 3, N, 0.5), 1)
    together = (mask.T @ mask / rows)[~torch.eye(N, dtype=torch.bool)]
    assert (together - K * (K - 1) / (N * (N - 1))).abs().max() < 0.015


def test_padding_is_a_word_like_any_other():
    """Released FLIP has no padding mask: the row of padding is learned, and its number matters."""
    module, batch = flip_pretraining(), made_batch(lengths=(5, 9), size=32)
    combine(module(batch)).backward()
    assert module.model.text.word.weight.grad[SPECIALS["pad"]].any()
    assert not module.model.text.word.weight.grad[[SPECIALS["bos"], SPECIALS["eos"]]].any()


@pytest.mark.parametrize("size", ["b16", "l16", "h14", "tiny", "small"])
def test_the_default_shape_is_clips_with_the_towers_of_the_published_one(size):
    """Beside the parts that CLIP has in other forms, no layer differs."""
    ours, published = getattr(sizes, f"flip_{size}")(), getattr(sizes, f"flip_{size}_published")()
    assert (ours.image.depth, ours.text.depth) == (published.image.depth, published.text.depth)
    for one, other in ((ours.image, published.image), (ours.text, published.text)):
        assert one.layer == replace(other.layer, activation="gelu", eps=1e-5)
    assert (ours.image.size, ours.image.patch) == (published.image.size, published.image.patch)
    assert ours.embed.width == published.embed.width and ours.embed.text_mask == "causal"
    assert (ours.embed.image.pool, ours.embed.text.pool) == ("first", "last")
    assert ours.image.position_start == "sincos" and ours.image.embed_norm


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def towers_run(pairs, out, **changes) -> TrainConfig:
    """Two steps of FLIP's towers at 16 px."""
    model = sizes.flip_published(sizes.Tower(1, 16, 2), sizes.Tower(1, 16, 2), width=8, size=16, patch=4, length=12)
    run = made_run(pairs, out, "clip", steps=2, keep=0.5)
    return replace(run, **{"model": model, "data": replace(run.data, max_length=14), **changes})


def test_tuning_goes_on_with_weights_and_temperature_and_nothing_else(pairs, tmp_path):
    """Section A.1: a fresh optimiser and step count; fixed positions of the finer grid are made, not resized."""
    masked = train(towers_run(pairs, tmp_path / "masked", augment=AugmentConfig(crop=(0.5, 1.0), flip=0.5)))
    run = towers_run(pairs, tmp_path / "tuned", init=str(tmp_path / "masked"))
    larger = replace(run.model, image=replace(run.model.image, size=32))
    tuned = start(replace(run, model=larger, keep=1.0))
    assert_equal(weights(tuned), weights(masked))
    scale = masked.pretraining.objectives["clip"].log_scale
    assert scale != math.log(1 / 0.07) and not tuned.inherited.resized and not tuned.inherited.fresh
    assert {"image.patch.weight", "objectives.clip.log_scale"} < {*tuned.inherited.loaded}
    assert tuned.step == 0 and not tuned.optimiser.state
    assert tuned.model.image.position.shape == (65, 16)
    assert next(steps(tuned)).pairs == 8


def test_another_objective_starts_anew(pairs, tmp_path):
    train(towers_run(pairs, tmp_path / "clip"))
    run = towers_run(pairs, tmp_path / "siglip", init=str(tmp_path / "clip"), objectives={"clip": SigLIPConfig()})
    started = start(run)
    assert {*started.inherited.fresh} == {"objectives.clip.log_scale", "objectives.clip.bias"}
    assert started.pretraining.objectives["clip"].log_scale.item() == pytest.approx(math.log(10))


def test_clipas_second_stage_resizes_learned_positions(pairs, tmp_path):
    small = sizes.clip(sizes.Tower(1, 16, 2), sizes.Tower(1, 16, 2), width=8, size=16, patch=4, positions=16)
    train(towers_run(pairs, tmp_path / "short", model=small, keep=1.0))
    full = replace(small, image=replace(small.image, size=32))
    run = towers_run(pairs, tmp_path / "full", init=str(tmp_path / "short"), model=full, keep=1.0)
    state = start(run)
    assert state.inherited.resized == ["image.position"] and next(steps(state)).pairs == 8


def test_the_recipe_of_the_paper():
    run = recipe("flip_l16")
    assert run.model == sizes.flip_l16_published()
    assert run.data.batch_size * run.accumulate * 8 == 65_536 and run.keep == 0.5 and run.steps == 190_000
    assert run.optim.lr == pytest.approx(1.024e-3) and run.optim.warmup * 12.8e9 == pytest.approx(51.2e6)
    assert run.objectives == {"clip": CLIPConfig(temperature=0.07, max_scale=100, bound="clip")}
    tune = recipe("flip_tune")
    assert (tune.keep, tune.optim.warmup, tune.optim.lr) == (1, 0.2, recipe("flip_photos").optim.lr / 100)
