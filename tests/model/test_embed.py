"""Two towers: what a text's vector may depend on, and what pools what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model import sizes
from fastvlp.model.joint_space import EmbedConfig, Head, HeadConfig
from fastvlp.model.like_lengths import GPU_ROWS, ROWS, worthwhile
from fastvlp.model.model import VLModel
from tests.made import made_batch, made_config


def towers(**embed) -> VLModel:
    torch.manual_seed(0)
    config = made_config()
    return VLModel(
        replace(sizes.two_towers(config, width=24), embed=replace(sizes.joint_space(config, width=24), **embed))
    ).eval()


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_padding_does_not_move_a_text(mask, pool):
    model, batch = towers(text_mask=mask, text=HeadConfig(pool=pool, norm=True)), made_batch(lengths=(5, 9))
    alone = model.embed_text(batch.ids[:1, :5], batch.length[:1])
    torch.testing.assert_close(model.embed_text(batch.ids, batch.length)[:1], alone)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(1))


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_texts_of_a_large_batch_are_encoded_in_groups_of_like_length(pool, monkeypatch):
    """The vectors are the same, their order too, and most of the padding is not encoded."""
    model = towers(text_mask="full", text=HeadConfig(pool=pool, norm=True))
    batch = made_batch(lengths=tuple(3 + 7 * i % 11 for i in range(2 * ROWS)))
    encoded = []
    model.text.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0].numel()))
    grouped = model.embed_text(batch.ids, batch.length)
    monkeypatch.setattr("fastvlp.model.like_lengths.ROWS", len(batch))
    torch.testing.assert_close(grouped, model.embed_text(batch.ids, batch.length))
    assert len(encoded) == 3 and sum(encoded[:2]) < 0.85 * encoded[2]


def test_on_a_gpu_groups_are_larger_and_asked_for():
    ids = torch.zeros(2 * GPU_ROWS, 3, dtype=torch.int64, device="meta")
    assert not worthwhile(ids, False) and worthwhile(ids, True) and not worthwhile(ids[1:], True)
    assert worthwhile(torch.zeros(2 * ROWS, 3), False) and ROWS < GPU_ROWS


def test_without_a_mask_a_text_of_fixed_length_sees_its_padding():
    flip = {"text_mask": "none", "text_special": False, "text_length": 12, "text": HeadConfig(pool="first", norm=True)}
    model, batch = towers(**flip), made_batch(lengths=(5, 9))
    vector = model.embed_text(batch.ids, batch.length)
    torch.testing.assert_close(vector[:1], model.embed_text(batch.ids[:1, :5], batch.length[:1]))
    shorter = replace(model.config.embed, text_length=8)
    model.embed.config = shorter
    assert not torch.allclose(vector, model.embed_text(batch.ids, batch.length))


def test_a_text_that_is_cut_ends_all_the_same():
    """Or the last state, which is CLIP's summary, would be a word's."""
    model, batch = towers(text_length=6), made_batch(lengths=(5, 9))
    ids, length = model.embed.words(batch.ids, batch.length, model.config.text)
    eos, pad = model.config.text.eos, model.config.text.pad
    assert length.tolist() == [5, 6] and ids[:, 4:].tolist() == [[eos, pad], [int(batch.ids[1, 4]), eos]]
    assert torch.equal(ids[:, :4], batch.ids[:, :4])


def test_special_ids_are_left_out():
    model, batch = towers(text_special=False, text=HeadConfig(pool="mean", norm=True)), made_batch(lengths=(6, 8))
    ids, length = model.embed.words(batch.ids, batch.length, model.config.text)
    text = model.config.text
    assert ids.shape == (2, 7) and length.tolist() == [4, 6]
    assert text.bos not in ids and text.eos not in ids
    assert (ids[0, 4:] == text.pad).all() and (ids[0, :4] == batch.ids[0, 1:5]).all()


def test_kept_positions_alone_are_encoded():
    model, batch = towers(text_mask="full", text=HeadConfig(pool="mean", norm=True)), made_batch(lengths=(8, 8))
    keep = torch.tensor([[0, 2, 7], [0, 3, 7]])
    vector = model.embed_text(batch.ids, batch.length, keep)
    changed = batch.ids.clone()
    changed[:, [1, 4, 5, 6]] = 11
    torch.testing.assert_close(model.embed_text(changed, batch.length, keep), vector)
    everything = torch.arange(8).expand(2, 8)
    torch.testing.assert_close(
        model.embed_text(batch.ids, batch.length, everything), model.embed_text(batch.ids, batch.length)
    )


def test_pools():
    state = torch.arange(24.0).reshape(2, 4, 3)
    seen = torch.arange(4) < torch.tensor([[3], [4]])
    pooled = lambda pool, n=seen: Head(HeadConfig(pool=pool), 3, 3).pooled(state, n)  # noqa: E731
    torch.testing.assert_close(pooled("mean")[0], state[0, :3].mean(0))
    torch.testing.assert_close(pooled("patches", None), state[:, 1:].mean(1))
    assert (pooled("last") == state[[0, 1], [2, 3]]).all() and (pooled("first") == state[:, 0]).all()


def test_a_two_layer_head_is_linear_relu_linear():
    head = Head(HeadConfig(pool="first", hidden=5, bias=True), 3, 4)
    x = torch.randn(2, 1, 3)
    y = head.out(head.hidden(x[:, 0]).relu())
    torch.testing.assert_close(head(x), y / y.norm(dim=1, keepdim=True))


def test_a_skip_is_added_to_the_hidden_layer():
    head = Head(HeadConfig(pool="first", hidden=5, skip=True), 3, 4)
    x = torch.randn(2, 1, 3)
    y = head.out(head.hidden(x[:, 0]).relu()) + head.skip(x[:, 0])
    torch.testing.assert_close(head(x), y / y.norm(dim=1, keepdim=True))


def test_dropout_of_a_head_is_of_its_hidden_layer_in_training_alone():
    head = Head(HeadConfig(pool="first", hidden=5, bias=True, dropout=1 - 1e-9), 3, 4)
    x, bias = torch.randn(2, 1, 3), head.out.bias
    torch.nn.init.normal_(bias)
    torch.testing.assert_close(head(x), (bias / bias.norm()).expand(2, -1))
    assert not torch.allclose(head.eval()(x)[0], head(x)[1])


def test_parts_that_are_absent_are_named():
    model, batch = towers(), made_batch(lengths=(4,))
    image = model.encode_image(batch.image)
    with pytest.raises(UserError, match=r"no fusion.*model\.fusion"):
        model.read(image, batch.ids)
    with pytest.raises(UserError, match=r"no embed.*model\.embed"):
        VLModel(made_config()).embed_image(image)


def test_configs_that_do_not_fit_are_refused():
    config = made_config()
    embed = EmbedConfig(width=8, image=HeadConfig(pool="patches"), text=HeadConfig(pool="first"))
    with pytest.raises(UserError, match=r"model\.embed\.image\.pool.*choose mean"):
        VLModel(replace(config, embed=embed, image=replace(config.image, class_token=False)))
    with pytest.raises(UserError, match=r"model\.embed\.image\.skip.*hidden"):
        VLModel(replace(config, embed=replace(embed, image=HeadConfig(pool="mean", skip=True))))
    with pytest.raises(UserError, match="text_length` 99"):
        VLModel(replace(config, embed=replace(embed, image=HeadConfig(pool="mean"), text_length=99)))
