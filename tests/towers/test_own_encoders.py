"""Features of our own encoders and heads for public weights: more tokens, a last norm, a query that pools, SigLIP's texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model.encoders.text_transformer import with_positions
from fastvlp.model.joint_space import EmbedConfig, Head, HeadConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import VLModel
from tests.made import made_config

LAYER = LayerConfig(width=32, heads=4, hidden=64)


def test_more_tokens_come_after_the_class_token_and_are_no_cells():
    config = replace(made_config().image, more_tokens=2)
    vit = config.build()
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    keep = torch.tensor([[0, 3], [1, 2]])
    assert (config.prefix, config.tokens) == (3, 7)
    assert vit(image).shape == (2, 7, 32) and vit(image, keep).shape == (2, 5, 32)
    assert vit.more_tokens.shape == (2, 32) and vit.position.shape == (7, 32)
    larger = replace(config, size=32).build()
    resized = larger.resized(vit.state_dict())
    assert torch.equal(resized["position"][:3], vit.position[:3])
    larger.load_state_dict(resized)


def test_a_last_norm_follows_the_last_layer_also_in_steps():
    text = replace(made_config().text, last_norm=True)
    plain, normed = replace(text, last_norm=False).build(), text.build()
    normed.load_state_dict({**normed.state_dict(), **plain.state_dict()})
    ids, place = torch.randint(4, 40, (2, 5)), torch.arange(5)
    last = torch.nn.functional.layer_norm(plain(ids, place, causal=True), (32,))
    assert text.final_norm and not replace(text, last_norm=False).final_norm
    assert torch.allclose(normed(ids, place, causal=True), last)
    past = normed.empty_past(last)
    for i in range(5):
        state = normed.step(ids[:, i : i + 1], torch.full((2, 1), i), past)
        assert torch.allclose(state[:, 0], last[:, i], atol=1e-5)


def test_positions_repeat_after_the_rows_that_stand_for_none():
    table = torch.arange(5.0)[:, None]
    assert with_positions(table, 8, 2)[:, 0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4]
    assert with_positions(table, 4, 2)[:, 0].tolist() == [0, 1, 2, 3]
    assert with_positions(table, 5) is table


def test_a_query_pools_what_is_no_padding():
    head = Head(HeadConfig(pool="attention", layer=LAYER), 32, 8)
    states, length = torch.randn(2, 6, 32), torch.tensor([6, 4])
    vectors = head(states, length)
    changed = states.clone()
    changed[1, 4:] = 9
    assert torch.equal(head(changed, length), vectors)
    assert not torch.allclose(head(changed), vectors)
    with pytest.raises(UserError, match="layer"):
        HeadConfig(pool="attention").check("image", 32, 8)
    with pytest.raises(UserError, match="project"):
        HeadConfig(pool="mean", project=False).check("image", 32, 8)


def test_the_end_is_the_last_position_and_a_start_may_be_left_out():
    config = made_config(reconstructor=False)
    head = HeadConfig(pool="end", norm=True)
    embed = EmbedConfig(
        width=8, image=HeadConfig(pool="mean"), text=head, text_mask="none", text_start=False, text_length=6
    )
    model = VLModel(replace(config, fusion=None, embed=embed, text=replace(config.text, learn_pad=True)))
    ids = torch.tensor([[1, 9, 8, 2], [1, 7, 2, 0]])
    words, length = model.embed.words(ids, torch.tensor([4, 3]), model.config.text)
    assert words.tolist() == [[9, 8, 2, 0, 0, 0], [7, 2, 0, 0, 0, 0]] and length.tolist() == [3, 2]
    assert model.config.longest_text == config.text.positions + 1
    states = model.text(words, torch.arange(6))
    seen = replace(model.embed.config, text_pad=2)
    model.embed.config = seen
    assert model.embed.words(ids, torch.tensor([4, 3]), model.config.text)[0].tolist()[1] == [7, 2, 2, 2, 2, 2]
    model.embed.config = embed
    assert torch.equal(model.embed_text(ids, torch.tensor([4, 3])), model.embed.text(states))
