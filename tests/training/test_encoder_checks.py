"""A run stops at its start if an encoder does not do what its interface says; three methods make a text encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvlp import TextEncoder, TextEncoderConfig, UserError, VLModel
from fastvlp.model.sizes import fusion_model
from fastvlp.tasks.generation import beam_search
from fastvlp.training.encoder_checks import check_encoders

SMALL = fusion_model(width=32, depths=(1, 1, 1), size=32, patch=16, positions=16, norm="pre", reconstructor=False)


@dataclass(frozen=True, kw_only=True)
class BagConfig(TextEncoderConfig):
    width: int = 32
    depth: int = 1
    module: Callable[[Any], TextEncoder]

    def build(self) -> TextEncoder:
        return self.module(self)


class Bag(TextEncoder):
    """An MLP of a token and of the mean of all tokens that it may attend to."""

    def __init__(self, config: BagConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab, config.width)
        self.mlp = nn.Sequential(nn.Linear(config.width, config.width), nn.GELU())

    @property
    def word_table(self) -> Tensor:
        return self.words.weight

    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind: Tensor | None = None) -> Tensor:
        return self.words(ids_BL) if kind is None else self.words(ids_BL) + kind

    def share(self, mask: Tensor) -> Tensor:
        return mask / mask.sum(-1, keepdim=True)

    def states(self, ids_BL: Tensor, position_BL: Tensor, *, mask: Any = None, causal: bool = False) -> list[Tensor]:
        x_BLD, L = self.embed(ids_BL, position_BL), ids_BL.shape[1]
        mask = torch.ones(1, 1, L, L) if mask is None else mask.float()
        return [x_BLD, self.mlp(x_BLD + self.share(mask.tril() if causal else mask)[:, 0] @ x_BLD)]


class FewStates(Bag):
    def states(self, *args: Any, **options: Any) -> list[Tensor]:
        return super().states(*args, **options)[-1:]


class SeesAll(Bag):
    def share(self, mask: Tensor) -> Tensor:
        return super().share(torch.ones_like(mask))


class IgnoresMask(Bag):
    def states(self, ids_BL: Tensor, position_BL: Tensor, *, mask: Any = None, causal: bool = False) -> list[Tensor]:
        return super().states(ids_BL, position_BL, causal=causal)


class SeesPadding(Bag):
    def share(self, mask: Tensor) -> Tensor:
        return super().share(mask if mask.shape[-2] > 1 else torch.ones_like(mask))


class SeesPaddingOfBothSides(SeesPadding):
    """A public encoder that takes no causal mask and mixes padding into its states, such as transformers' ConvBERT."""

    def states(self, *args: Any, causal: bool = False, **options: Any) -> list[Tensor]:
        if causal:
            raise UserError("reads both sides only")
        return super().states(*args, **options)


class ReadsBothSides(Bag):
    def states(self, *args: Any, causal: bool = False, **options: Any) -> list[Tensor]:
        if causal:
            raise NotImplementedError
        return super().states(*args, **options)


class OtherStep(Bag):
    def step(self, *args: Any) -> Tensor:
        return 2 * super().step(*args)


class KeepsSum(Bag):
    """Keeps the sum of the tokens so far and their number, in a tuple."""

    def empty_past(self, like_B: Tensor) -> list[Any]:
        return [(self.word_table.new_zeros(len(like_B), 1, self.word_table.shape[1]), 0)]

    def step(self, ids_B1: Tensor, position_B1: Tensor, past: list[Any]) -> Tensor:
        x_B1D, (sum_B1D, count) = self.words(ids_B1), past[0]
        past[0] = sum_B1D + x_B1D, count + 1
        return self.mlp(x_B1D + past[0][0] / past[0][1])


class KeepsCount(KeepsSum):
    """Keeps a tensor without a row for each text."""

    def empty_past(self, like_B: Tensor) -> list[Any]:
        return [(self.word_table.new_zeros(len(like_B), 1, self.word_table.shape[1]), torch.zeros(1))]


class HidesPast(KeepsSum):
    """Keeps it in an object, whose tensors are not found."""

    def empty_past(self, like_B: Tensor) -> SimpleNamespace:
        return SimpleNamespace(past=super().empty_past(like_B))

    def step(self, ids_B1: Tensor, position_B1: Tensor, past: Any) -> Tensor:
        return super().step(ids_B1, position_B1, past.past)


def model_with(module: type[Bag]) -> VLModel:
    torch.manual_seed(0)
    config = BagConfig(module=module, positions=16, vocab=20, pad=0, bos=1, eos=2, mask=3)
    return VLModel(replace(SMALL, text=config)).eval()


@pytest.mark.parametrize("module", [Bag, KeepsSum])
def test_texts_are_written_with_three_methods_and_with_any_past(module: type[Bag]) -> None:
    model = model_with(module)
    check_encoders(model)
    with torch.no_grad():
        states = model.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        ids_BT, _ = beam_search(model, states, beams=3, most=5)
        assert ids_BT.equal(beam_search(model_with(Bag), states, beams=3, most=5)[0])
        cache, written = model.begin(states), torch.tensor([[1, 5, 7], [1, 8, 4]])
        steps = torch.stack([model.step(ids_B, cache) for ids_B in written.T], 1)
        whole = model.read(states, written, causal=True)
    torch.testing.assert_close(steps, whole)


def test_an_encoder_may_read_both_sides_only() -> None:
    check_encoders(model_with(ReadsBothSides))


@pytest.mark.parametrize(
    ("module", "method"),
    [
        (FewStates, "states"), (SeesAll, "causal"), (IgnoresMask, "mask"), (SeesPadding, ".*hides"), (OtherStep, "step"),
        (HidesPast, "step.*past"), (SeesPaddingOfBothSides, ".*hides"), (KeepsCount, ".*row for each text"),
    ],
)  # fmt: skip
def test_a_fault_stops_the_run_at_its_start(module: type[Bag], method: str) -> None:
    with pytest.raises(UserError, match=f"BagConfig.*`?{method}"):
        check_encoders(model_with(module))
