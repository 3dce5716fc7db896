"""Encoders of transformers, through the interface of ours, compute what transformers computes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.encoders.transformers_image import TransformersImageConfig
from fastvlp.model.encoders.transformers_models import architecture_of
from fastvlp.model.encoders.transformers_text import TransformersTextConfig
from fastvlp.model.layers import select_rows
from tests.towers.public import MAPS, image_models, randomised, text_models

TOLERANCE = 1e-5


def image_encoder(name: str):
    """Their model and ours, with the same weights."""
    theirs = randomised(image_models()[name])
    size = 64 if name in MAPS else 32
    ours = TransformersImageConfig(size=size, architecture=architecture_of(theirs.config)).build()
    ours.model.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


@pytest.mark.parametrize("name", image_models())
def test_image_states_are_those_of_transformers(name):
    theirs, ours = image_encoder(name)
    image = torch.randn(2, 3, ours.config.size, ours.config.size)
    known = theirs(pixel_values=image).last_hidden_state
    known = known.flatten(2).transpose(1, 2) if name in MAPS else known
    states = ours(image)
    assert states.shape == (2, ours.config.tokens, ours.config.width)
    assert (states - known).abs().max() <= TOLERANCE
    prefix = {"deit": 2, "dinov2_with_registers": 5, "siglip": 0}.get(name, 0 if name in MAPS else 1)
    assert (ours.config.prefix, ours.config.grid) == (prefix, 2 if name in MAPS else 4)


@pytest.mark.parametrize("name", ["clip", "dinov2", "deit", "resnet"])
def test_another_image_size_has_another_map(name):
    _, ours = image_encoder(name)
    larger = replace(ours.config, size=2 * ours.config.size)
    again = larger.build().eval()
    again.load_state_dict(again.resized(ours.state_dict()))
    image = torch.randint(0, 256, (2, 3, larger.size, larger.size), dtype=torch.uint8)
    assert larger.grid == 2 * ours.config.grid
    assert again(image).shape == (2, larger.tokens, larger.width)


def test_batch_norms_keep_their_statistics_and_what_is_not_read_is_not_trained():
    _, ours = image_encoder("resnet")
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    image = torch.randn(2, 3, 64, 64)
    ours.train()
    ours(image).sum().backward()
    assert all(torch.equal(before[name], x) for name, x in ours.state_dict().items())
    _, ours = image_encoder("vit")
    ours(torch.randn(1, 3, 32, 32)).sum().backward()
    assert {name for name, p in ours.named_parameters() if p.grad is None} == {
        name for name, p in ours.named_parameters() if not p.requires_grad
    }
    assert not ours.model.pooler.dense.weight.requires_grad


def test_a_config_is_json_and_another_kind_of_model_is_refused():
    config = TransformersImageConfig(size=32, architecture=architecture_of(image_models()["clip"].config))
    assert json.loads(json.dumps(config.architecture)) == config.architecture
    assert hash(config) == hash(replace(config))
    for architecture in ({"model_type": "bert"}, {"model_type": "nothing_of_that_name"}, {}):
        with pytest.raises(UserError):
            replace(config, architecture=architecture).check()


def text_encoder(name: str, **fields):
    """Their model and ours, with the same weights."""
    theirs = randomised(text_models()[name])
    position = next((x for key, x in theirs.named_modules() if "position_embedding" in key), None)
    offset = 0 if position is None or position.padding_idx is None else position.padding_idx + 1
    config = TransformersTextConfig(
        architecture=architecture_of(theirs.config),
        positions=24,
        vocab=99,
        pad=theirs.config.pad_token_id,
        position_offset=offset,
        pad_position=offset - 1 if offset else None,
        **fields,
    )
    ours = config.build()
    ours.model.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def words(pad: int, *lengths: int):
    length = torch.tensor(lengths)
    ids = torch.randint(5, 95, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    place = torch.arange(ids.shape[1])
    real = place < length[:, None]
    return torch.where(real, ids, pad), real, length, place


@pytest.mark.parametrize("name", text_models())
def test_text_states_are_those_of_transformers(name):
    theirs, ours = text_encoder(name)
    ids, real, length, place = words(ours.config.pad, 9, 5)
    known = theirs(input_ids=ids, attention_mask=real.long(), output_hidden_states=True)
    states = ours.states(ids, place, mask=masks.full(length, ids.shape[1]))
    assert len(states) == ours.config.depth + 1
    for mine, theirs_ in zip(states, [*known.hidden_states[:-1], known.last_hidden_state], strict=True):
        assert mine.shape[-1] == ours.config.width
        assert (mine - theirs_)[real].abs().max() <= TOLERANCE
    assert torch.equal(ours.embed(ids, place), states[0])
    assert ours.word_table.shape[0] == 99


@pytest.mark.parametrize("name", text_models())
def test_text_is_read_left_to_right_and_in_steps(name):
    _, ours = text_encoder(name)
    ids, _, _, place = words(ours.config.pad, 7, 7)
    whole = ours(ids, place, causal=True)
    assert (whole[:, :4] - ours(ids[:, :4], place[:4], causal=True)).abs().max() <= TOLERANCE
    past = ours.empty_past(whole)
    for i in range(7):
        state = ours.step(ids[:, i : i + 1], torch.full((2, 1), i), past)
        assert (state[:, 0] - whole[:, i]).abs().max() <= TOLERANCE
    chosen = select_rows(past, torch.tensor([1]))
    assert chosen[0].length == 7 and ours.step(ids[1:, :1], torch.full((1, 1), 7), chosen).shape == (1, 1, 32)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_a_mask_of_rows_and_columns_is_honoured(name):
    """FLM's official masks: what a row does not see does not change it."""
    _, ours = text_encoder(name)
    ids, _, length, place = words(ours.config.pad, 6, 6)
    mask = masks.anticausal_official(length, 6)
    states = ours(ids, place, mask=mask)
    changed = ids.clone()
    changed[:, 2] = 96
    difference = (ours(changed, place, mask=mask) - states).abs().amax(-1)
    assert difference[:, 3:].max() <= TOLERANCE and difference[:, :3].min() > 1e-3


def test_positions_grow_layers_are_cut_and_dropout_is_on_in_training():
    _, ours = text_encoder("electra")
    longer = replace(ours.config, positions=40).build().eval()
    longer.load_state_dict(longer.resized(ours.state_dict()))
    ids, _, _, place = words(0, 9)
    assert torch.equal(longer(ids, place), ours(ids, place))
    assert torch.equal(longer.embed(ids, place + 24), ours.embed(ids, place))
    assert [replace(ours.config.with_depth(n)).depth for n in (0, 2)] == [0, 2]
    ours.train()
    torch.manual_seed(0)
    assert not torch.equal(ours(ids, place), ours(ids, place))


def test_a_family_that_takes_no_masks_says_so():
    import transformers as hf

    given = hf.DebertaV2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=99,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
    )
    encoder = TransformersTextConfig(architecture=architecture_of(given), positions=24, vocab=99).build()
    ids, _, length, place = words(0, 5, 4)
    assert encoder(ids, place, mask=masks.full(length, 5)).shape == (2, 5, 32)
    with pytest.raises(UserError, match="deberta-v2"):
        encoder(ids, place, causal=True)
