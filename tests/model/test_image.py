"""The image tower: fixed positions, and which patches are kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastvlp.errors import UserError
from fastvlp.model.encoders.vit import ViT, ViTConfig, sincos_positions
from fastvlp.model.keep import keep_count, random_keep
from fastvlp.model.layers import LayerConfig, gelu_tanh
from fastvlp.model.model import VLModel
from tests.made import made_config

LAYER = LayerConfig(width=32, heads=4, hidden=64)
CONFIG = ViTConfig(size=32, patch=8, depth=2, layer=LAYER, position="sincos")


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_fixed_positions_are_sines_and_cosines_of_column_and_row():
    table = sincos_positions(3, 16, prefix=1)
    assert table.shape == (10, 16) and not table[0].any()
    for row in range(3):
        for column in range(3):
            waves = [10000 ** (-q / 4) for q in range(4)]
            known = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in waves]
            assert table[1 + 3 * row + column].tolist() == pytest.approx(known, abs=1e-6)


def test_fixed_positions_are_neither_learned_nor_saved():
    tower = ViT(CONFIG)
    assert "position" not in dict(tower.named_parameters()) and "position" not in tower.state_dict()
    larger = ViT(replace(CONFIG, size=48))
    larger.load_state_dict(tower.state_dict())
    assert torch.equal(larger.position, sincos_positions(6, 32, prefix=1))


@pytest.mark.parametrize("initial", ["bert", "mae"])
def test_learned_positions_may_begin_at_sines_and_cosines(initial):
    """Those of FLIP in the shape of CLIP do; they are learned from there, saved, and resized as any learned table."""
    image = ViTConfig(size=32, patch=8, depth=1, layer=LAYER, position_start="sincos")
    model = VLModel(replace(made_config(), image=image, initial=initial))
    assert torch.equal(model.image.position, sincos_positions(4, 32, prefix=1))
    assert "image.position" in dict(model.named_parameters()) and "image.position" in model.state_dict()
    assert model.image.resized({"position": torch.zeros(10, 32)})["position"].shape == (17, 32)
    assert image.normal_form() == replace(image, position_start="random")
    with pytest.raises(UserError, match="position_start"):
        replace(image, layer=LayerConfig(width=30, heads=3, hidden=60)).check()


def test_the_class_token_has_no_position_and_comes_after_the_masking():
    """The states of kept patches are the same in any order of the patches."""
    tower, image = ViT(CONFIG).double(), images()
    keep = random_keep(torch.tensor([3, 4]), 16, 0.5)
    states = tower(image, keep)
    assert states.shape == (2, 9, 32)
    torch.testing.assert_close(tower(image, keep.flip(1)), torch.cat([states[:, :1], states[:, 1:].flip(1)], 1))


def test_keeping_all_patches_changes_nothing():
    tower, image = ViT(CONFIG), images()
    torch.testing.assert_close(tower(image, torch.arange(16).expand(2, 16)), tower(image))


def test_dropped_patches_are_never_read():
    tower, image = ViT(CONFIG), images()
    keep = random_keep(torch.tensor([1, 2]), 16, 0.25)
    dropped = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False)
    changed = image.clone()
    for row, patch in dropped.nonzero().tolist():
        y, x = 8 * (patch // 4), 8 * (patch % 4)
        changed[row, :, y : y + 8, x : x + 8] = 7
    assert not torch.equal(changed, image)
    assert torch.equal(tower(changed, keep), tower(image, keep))


@pytest.mark.parametrize(
    ("patches", "share", "kept"),
    [(196, 0.5, 98), (196, 0.25, 49), (256, 0.5, 128), (256, 0.25, 64), (49, 0.5, 24), (7, 0.1, 1), (9, 1.0, 9)],
)
def test_the_share_is_filled_with_whole_patches(patches, share, kept):
    assert keep_count(patches, share) == kept
    assert random_keep(torch.arange(3), patches, share).shape == (3, kept)


def test_a_share_made_of_a_count_gives_that_count():
    """As FLIP writes it, int(L * (1 - ratio)), but for floating point: 100 * (1 - 0.9) is 9.99..."""
    assert all(keep_count(n, k / n) == k for n in range(1, 257) for k in range(1, n + 1))
    assert keep_count(100, 1 - 0.9) == 10


def test_sincos_needs_a_width_of_four_quarters():
    config = made_config()
    layer = LayerConfig(width=30, heads=3, hidden=30)
    with pytest.raises(UserError, match="divisible by 4"):
        VLModel(replace(config, image=replace(config.image, layer=layer, position="sincos")))


def test_tanh_gelu_is_its_formula():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    known = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu_tanh(x), known)
    assert (gelu_tanh(x) - F.gelu(x)).abs().max() > 1e-4


def test_mae_draws_query_key_and_value_as_one_matrix():
    torch.manual_seed(0)
    model = VLModel(replace(made_config(width=64), initial="mae"))
    block = model.image.blocks[0]
    bounds = {
        block.attend.qkv.weight: math.sqrt(6 / (64 + 3 * 64)),
        block.mlp_in.weight: math.sqrt(6 / (64 + 128)),
        model.image.patch.weight: math.sqrt(6 / (64 + 3 * 8**2)),
    }
    for weight, bound in bounds.items():
        assert 0.97 * bound < weight.abs().max() <= bound
    for table in (model.text.word.weight, model.text.position.weight, model.image.class_token):
        assert 0.015 < table.std() < 0.025
    assert not block.mlp_in.bias.any() and (block.mlp_norm.weight == 1).all() and not model.image.norm.bias.any()
