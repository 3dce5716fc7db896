"""The counted FLOPs against PyTorch's own counter, and against numbers worked out by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvlp.batch import Batch, Regions
from fastvlp.data.augment import AugmentConfig
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import brivl_tiny, flm_base, tiny, two_towers, with_tokenizer
from fastvlp.objectives.ar import ARConfig
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig, official_flm
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.objectives.objective import combine
from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.objectives.reconstruct import ReconstructConfig
from fastvlp.objectives.siglip import SigLIPConfig
from fastvlp.objectives.simclr import SimCLRConfig
from fastvlp.training.flops import EVERY, FlopCounter, Flops, Shape, gradient_flops
from fastvlp.training.gradient_cache import cache_gradients
from fastvlp.training.hardware import adamw_bytes, peak_flops, peak_memory
from fastvlp.training.pretraining import Pretraining

TOKENIZER = SimpleNamespace(vocab_size=500, pad=0, bos=1, eos=2, mask=3, starts_word=torch.ones(500, dtype=torch.bool))
CONFIG = with_tokenizer(tiny(size=32), TOKENIZER)


def made_batch(B=6, L=11) -> Batch:
    torch.manual_seed(0)
    length = torch.randint(4, L + 1, (B,))
    length[0] = L
    ids = torch.randint(4, 500, (B, L))
    ids[:, 0] = 1
    ids[torch.arange(B), length - 1] = 2
    ids[torch.arange(L) >= length[:, None]] = 0
    image = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8)
    return Batch(image=image, ids=ids, length=length, seed=torch.arange(B) * 7919)


def by_pytorch(pretraining: Pretraining, batch: Batch) -> int:
    """Forward and backward, by attention that is written out: nothing is computed twice."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        combine(pretraining(batch)).backward()
    pretraining.zero_grad()
    return counter.get_total_flops()


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize(
    "objective",
    [
        FLMConfig(),
        official_flm("centred", 0.5),
        FLMConfig(forward_weight=0.0),
        MLMConfig(),
        ARConfig(),
        PrefixLMConfig(),
        ITMConfig(candidates=1),
        ITMConfig(candidates=4),
    ],
    ids=lambda c: type(c).__name__,
)
def test_counts_are_those_of_pytorch(objective, keep):
    pretraining, batch = Pretraining(VLModel(CONFIG), {"it": objective.build(CONFIG, TOKENIZER)}, keep), made_batch()
    assert gradient_flops(pretraining, lambda: combine(pretraining(batch))) == by_pytorch(pretraining, batch)
    assert all(parameter.grad is None for parameter in pretraining.parameters())


@pytest.mark.parametrize(
    "objectives",
    [
        [CLIPConfig(text_keep=0.5)],
        [SigLIPConfig()],
        [MoCoConfig(queue=12, text_keep=0.5, key_keep=0.25)],
        [ReconstructConfig(depth=2, width=64, heads=4)],
        [CLIPConfig(), SimCLRConfig(augment=AugmentConfig(), hidden=16, width=8, keep=0.25)],
    ],
    ids=lambda configs: type(configs[-1]).__name__,
)
@pytest.mark.parametrize("special", [True, False])
def test_counts_of_two_towers_are_those_of_pytorch(objectives, special):
    config = two_towers(CONFIG, width=8)
    config = replace(config, embed=replace(config.embed, text_special=special, text_length=8))
    built = {str(i): objective.build(config, TOKENIZER) for i, objective in enumerate(objectives)}
    pretraining, batch = Pretraining(VLModel(config), built, 0.5), made_batch()
    for objective in built.values():
        objective.begin(pretraining.model)
    assert gradient_flops(pretraining, lambda: combine(pretraining(batch))) == by_pytorch(pretraining, batch)


def test_counts_of_heads_that_attend_are_those_of_pytorch():
    config = with_tokenizer(brivl_tiny(size=32), TOKENIZER)
    pretraining, batch = Pretraining(VLModel(config), {"clip": CLIPConfig().build(config, TOKENIZER)}), made_batch()
    batch = replace(batch, regions=Regions(box=torch.rand(6, 20, 4), count=torch.full((6,), 20)))
    assert gradient_flops(pretraining, lambda: combine(pretraining(batch))) == by_pytorch(pretraining, batch)


def by_hand(batch: Batch, texts: int, fusion: bool = True) -> int:
    """One forward pass of the tiny model over `texts` texts an image: width D 96, hidden 384; 4 layers over an image of 16
    patches of 8 pixels and a class token, 1 over a text, 2 of fusion. A token costs a layer 2 (4 D^2 + 2 D 384) operations,
    a pair of tokens 4 D; a query and its output 4 D^2 where text reads the image, and so do an image's key and value."""
    B, L = batch.ids.shape
    N, D = 17, 96
    token, pair, cross = 2 * (4 * D**2 + 2 * D * 384), 4 * D, 4 * D**2
    image = B * 16 * 2 * (3 * 8**2) * D + 4 * B * (N * token + N**2 * pair)
    text = texts * B * (L * token + L**2 * pair)
    joint = 2 * (text + texts * B * (L * cross + L * N * pair) + B * N * cross)
    enter = 2 * D**2 * (texts * B * L + B * N)
    return image + text + (joint + enter if fusion else 0)


def test_a_forward_pass_costs_what_is_worked_out_by_hand():
    batch = made_batch()
    D, V, targets = 96, 500, int(batch.length.sum()) - len(batch)
    head = 2 * targets * D * (D + V)
    pretraining = Pretraining(VLModel(CONFIG), {"ar": ARConfig().build(CONFIG, TOKENIZER)})
    with torch.no_grad(), Flops() as flops:
        pretraining(batch)
    # The last column, </s> of the longest text, predicts nothing and is not computed.
    assert flops.total == by_hand(replace(batch, ids=batch.ids[:, :-1]), 1) + head
    # Forward, and twice that backward; but no gradient flows into pixels.
    trained = gradient_flops(pretraining, lambda: combine(pretraining(batch)))
    pixels = len(batch) * 16 * 2 * (3 * 8**2) * D
    # The vocabulary's bias gets its gradient by a product too.
    assert trained == 3 * flops.total - pixels + 2 * targets * V


def test_candidates_that_are_scored_without_gradients_count_once():
    batch = made_batch()
    costs = {}
    for candidates in (1, 4):
        objective = ITMConfig(candidates=candidates).build(CONFIG, TOKENIZER)
        pretraining = Pretraining(VLModel(CONFIG), {"itm": objective})
        costs[candidates] = gradient_flops(pretraining, lambda run=pretraining: combine(run(batch)))
    image_layers = by_hand(batch, 0, fusion=False)
    head = 2 * len(batch) * (96 * 96 + 96 * 2)
    assert costs[4] - costs[1] == 4 * (by_hand(batch, 1) - image_layers + head)


def test_momentum_keys_count_once():
    config = two_towers(CONFIG, width=8)
    batch, costs = made_batch(), {}
    for name, objective in (("clip", CLIPConfig()), ("moco", MoCoConfig(queue=12))):
        pretraining = Pretraining(VLModel(config), {name: objective.build(config, TOKENIZER)})
        pretraining.objectives[name].begin(pretraining.model)
        costs[name] = gradient_flops(pretraining, lambda run=pretraining: combine(run(batch)))
    towers = by_hand(batch, 1, fusion=False)
    # But for projections into 8 numbers and the logits, less than a hundredth.
    assert costs["moco"] - costs["clip"] == pytest.approx(towers, rel=0.01)


def test_what_is_computed_again_does_not_count(monkeypatch):
    config = replace(CONFIG, embed=two_towers(CONFIG, width=8).embed)
    whole = {"clip": CLIPConfig(), "ar": ARConfig()}
    costs = []
    for few in (False, True):
        if few:
            monkeypatch.setattr("fastvlp.objectives.tiled.WHOLE_LOGITS_CPU", 4)
            monkeypatch.setattr("fastvlp.objectives.losses.token_loss.__kwdefaults__", {"whole_logits": 2000})
        built = {name: objective.build(config, TOKENIZER) for name, objective in whole.items()}
        pretraining, batch = Pretraining(VLModel(config), built), made_batch()
        costs.append(gradient_flops(pretraining, lambda run=pretraining, rows=batch: combine(run(rows))))
    # The head alone would be a hundredth more; how a bias gets its gradient differs.
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)


def test_cached_gradients_cost_what_one_large_batch_costs():
    config = two_towers(CONFIG, width=8)
    pretraining = Pretraining(VLModel(config), {"clip": CLIPConfig().build(config, TOKENIZER)})
    micro = [made_batch(), replace(made_batch(), seed=torch.arange(6) * 31)]
    flops = FlopCounter()
    counts = {name: 2 * count for name, count in pretraining.counts(micro[0]).items()}
    cached = cache_gradients(pretraining, micro, counts, lambda i: nullcontext(), flops)
    for batch, grads in zip(micro, cached.grads):
        with flops.counting(Shape.of("", batch)):
            combine(pretraining(batch, grads), counts).backward()
    pretraining.zero_grad()
    large = replace(
        micro[0], **{k: torch.cat([getattr(b, k) for b in micro]) for k in ("image", "ids", "length", "seed")}
    )
    assert flops.step == gradient_flops(pretraining, lambda: combine(pretraining(large), counts))


def test_a_shape_is_counted_once_and_few_steps_are_slowed_down():
    counter, weight = FlopCounter(), torch.ones(4, 3, requires_grad=True)

    def step(rows: int) -> float:
        counter.begin_step()
        with counter.counting(Shape("only", rows, 5)):
            (torch.ones(rows, 4) @ weight).sum().backward()
        return counter.step

    # Forward, and the gradient of the weight.
    assert step(8) == 2 * (2 * 8 * 4 * 3) == 384
    # Too soon to count again: as many rows more as they cost.
    assert step(12) == 384 * 12 / 8 and len(counter._known) == 1
    for _ in range(EVERY):
        step(8)
    assert step(12) == 576 and len(counter._known) == 2


@pytest.mark.parametrize(("length", "flm", "one"), [(50, 55.5, 27.4), (14, 26.7, 18.0)])
def test_the_published_size_costs_what_was_worked_out_by_hand(length, flm, one):
    """GFLOPs of the forward pass of one pair at 288 px; worked out with the projections alone, so within 3 %."""
    tokenizer = SimpleNamespace(vocab_size=50265, pad=1, bos=0, eos=2, mask=50264)
    config = with_tokenizer(flm_base(), tokenizer)
    with torch.device("meta"):
        model = VLModel(config)
        image = torch.empty(1, 3, 288, 288, dtype=torch.uint8)
        ids, lengths = torch.zeros(1, length, dtype=torch.int64), torch.full((1,), length)
        with torch.no_grad(), Flops() as causal:
            state = model.read_causally(model.encode_image(image), ids, lengths, bos="blind")
            model.head(state)
        with torch.no_grad(), Flops() as both:
            streams = model.streams(model.encode_image(image), ids, lengths)
            mask = torch.ones(1, 1, length, 2 * length, dtype=torch.bool)
            query = model.reconstruct(streams, ids, torch.arange(length)[None], mask)
            model.head(torch.cat([query, query, query]))
    assert causal.total / 1e9 == pytest.approx(one, rel=0.03)
    assert both.total / 1e9 == pytest.approx(flm, rel=0.03)


def test_bytes_peaks_and_memory():
    assert adamw_bytes(10) == 280
    assert peak_flops("cpu") is None
    assert peak_memory("cpu") > 50e6


def test_peaks_are_found_by_the_name_of_the_device(monkeypatch):
    for name, peak in [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Riva 128", None)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops("cuda:0") == peak
