"""Text masking of the two-tower objectives: what is encoded, and that it is a function of the row's seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model import sizes
from fastvlp.model.joint_space import HeadConfig
from fastvlp.model.model import VLModel
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.pair_embedding import embed_pair
from fastvlp.objectives.siglip import SigLIPConfig
from tests.made import made_batch, made_config, made_tokenizer


def towers(**embed) -> VLModel:
    torch.manual_seed(0)
    config = sizes.two_towers(made_config(), width=24)
    flip = {"text_mask": "none", "text_special": False, "text_length": 16, "text": HeadConfig(pool="first", norm=True)}
    return VLModel(replace(config, embed=replace(config.embed, **(flip | embed)))).double()


HALF = CLIPConfig(text_keep=0.5)


def embedded(model: VLModel, batch, config=HALF) -> torch.Tensor:
    return embed_pair(model, model.encode_image(batch.image), batch, config)[1]


@pytest.mark.parametrize(("keep", "encoded"), [(1.0, 16), (0.5, 8), (0.3, 4)])
def test_the_other_positions_cost_nothing(keep, encoded):
    model, seen = towers(), []
    model.text.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    embedded(model, made_batch(lengths=(5, 9)), SigLIPConfig(text_keep=keep))
    assert seen == [encoded]


def test_what_a_row_keeps_is_a_function_of_its_seed():
    model, batch = towers(), made_batch(lengths=(9, 5, 12))
    together = embedded(model, batch)
    alone = replace(batch, **{name: getattr(batch, name)[1:2] for name in ("image", "ids", "length", "seed")})
    torch.testing.assert_close(embedded(model, replace(alone, ids=alone.ids[:, :5])), together[1:2])
    assert not torch.allclose(embedded(model, replace(batch, seed=batch.seed + 1)), together)


def test_prioritised_drops_padding_first():
    """Eight of sixteen positions hold a text of seven words whole, and one that is padding."""
    batch = made_batch(lengths=(9,))
    config = CLIPConfig(text_keep=0.5, text_policy="prioritised")
    model = towers(text_mask="full", text=HeadConfig(pool="mean", norm=True))
    torch.testing.assert_close(embedded(model, batch, config), embedded(model, batch, CLIPConfig()))
    assert not torch.allclose(embedded(model, batch), embedded(model, batch, CLIPConfig()))


@pytest.mark.parametrize("config", [HALF, SigLIPConfig(text_keep=0.5)])
def test_texts_of_any_length_have_no_share(config):
    with pytest.raises(UserError, match=r"`model\.embed\.text_length`"):
        config.build(sizes.two_towers(made_config()), made_tokenizer())
    assert config.build(towers().config, made_tokenizer()).config == config


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="text_keep"):
        CLIPConfig(text_keep=0.0)
    with pytest.raises(ValueError, match="scale"):
        SigLIPConfig(scale=0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.005, 1.5])
def test_a_temperature_beyond_its_bounds_is_refused(temperature):
    with pytest.raises(ValueError, match=f"`temperature` {temperature}"):
        CLIPConfig(temperature=temperature)
