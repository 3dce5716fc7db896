"""A text encoder of one's own, whose layers share their weights (arXiv 1909.11942), in a model with every part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import TextEncoder, TextEncoderConfig
from fastvlp.model.layers import Block, KeyValue, LayerConfig
from fastvlp.model.model import VLModel
from fastvlp.model.saving import load_model, save_model
from fastvlp.model.sizes import joint_space, with_tokenizer
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.objective import combine
from tests.made import made_batch, made_config, made_tokenizer


@dataclass(frozen=True, kw_only=True)
class SharedConfig(TextEncoderConfig):
    width: int
    depth: int

    def build(self) -> TextEncoder:
        return Shared(self)


class Shared(TextEncoder):
    def __init__(self, config: SharedConfig):
        super().__init__()
        self.depth = config.depth
        self.layer = LayerConfig(width=config.width, heads=2, hidden=config.width, norm="post")
        self.word = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.block = Block(self.layer)

    @property
    def word_table(self) -> Tensor:
        return self.word.weight

    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind: Tensor | None = None) -> Tensor:
        x = self.word(ids_BL) + self.position(position_BL)
        return x if kind is None else x + kind

    def states(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> list[Tensor]:
        states = [self.embed(ids_BL, position_BL)]
        for _ in range(self.depth):
            states.append(self.block(states[-1], mask=mask, causal=causal))
        return states

    def empty_past(self, like_B: Tensor) -> list[KeyValue]:
        return [KeyValue.empty(self.layer, like_B) for _ in range(self.depth)]

    def step(self, ids_B1: Tensor, position_B1: Tensor, past: list[KeyValue]) -> Tensor:
        x = self.embed(ids_B1, position_B1)
        for own in past:
            x = self.block(x, past=own)
        return x


def shared_model(vocabulary=None) -> VLModel:
    config = replace(made_config(), text=SharedConfig(positions=32, width=32, depth=2))
    config = with_tokenizer(replace(config, embed=joint_space(config, width=8)), vocabulary or made_tokenizer())
    torch.manual_seed(0)
    return VLModel(config)


def test_every_parameter_learns():
    model, batch = shared_model(), made_batch(lengths=(9, 4, 7))
    losses = {}
    for config in (CLIPConfig(), FLMConfig()):
        objective = config.build(model.config, made_tokenizer())
        losses |= objective(model, model.encode_image(batch.image), batch)
    combine(losses).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_decoding_step_by_step_equals_one_causal_read():
    model, batch = shared_model().double(), made_batch(lengths=(6, 6))
    image = model.encode_image(batch.image)
    whole, cache = model.read(image, batch.ids, causal=True), model.begin(image)
    for i in range(6):
        assert torch.allclose(model.step(batch.ids[:, i], cache), whole[:, i], atol=1e-10)


def test_it_is_saved_by_its_type(tmp_path):
    tokenizer = Tokenizer.train(["a red cube", "a blue ball"] * 3, vocab_size=60)
    model = shared_model(tokenizer)
    save_model(tmp_path, model, tokenizer, {})
    loaded = load_model(tmp_path).model
    assert loaded.config == model.config
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_fixed_depth_cannot_be_cut():
    with pytest.raises(UserError, match="SharedConfig"):
        SharedConfig(positions=32, width=32, depth=2).with_depth(1)
