"""The counted FLOPs against PyTorch's own counter."""

from __future__ import annotations

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
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.speed import (
    adamw_bytes,
    head_flops,
    image_flops,
    peak_flops,
    peak_memory,
    reconstructor_flops,
    step_flops,
    text_flops,
)

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
    ],
    ids=lambda c: type(c).__name__,
)
def test_counted_flops_agree_with_the_counter(objective, keep):
    model, batch = VLModel(CONFIG), made_batch()
    pretraining = Pretraining(model, {"it": objective.build(CONFIG, TOKENIZER)}, keep)
    targets = {name: count.item() for name, count in pretraining.counts(batch).items()}
    counted = step_flops(pretraining, [tuple(batch.ids.shape)], targets)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = combine(pretraining(batch))
        forward = counter.get_total_flops()
        loss.backward()
    assert counted.forward == pytest.approx(forward, rel=0.02)
    # Nothing is sent back to the pixels, and dead branches cost nothing: a little less than three times.
    assert counted.training == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    "objectives",
    [
        [CLIPConfig(text_keep=0.5)],
        [SigLIPConfig()],
        [MoCoConfig(queue=12, text_keep=0.5, key_keep=0.25)],
        [ReconstructConfig(depth=2, width=64, heads=4)],
        [CLIPConfig(), SimCLRConfig(augment=AugmentConfig(), hidden=16, width=8, keep=0.25)],
    ],
    ids=lambda told: type(told[-1]).__name__,
)
@pytest.mark.parametrize("special", [True, False])
def test_counted_flops_of_two_towers_agree_with_the_counter(objectives, special):
    config = two_towers(CONFIG, width=8)
    config = replace(config, embed=replace(config.embed, text_special=special, text_length=8))
    built = {str(i): told.build(config, TOKENIZER) for i, told in enumerate(objectives)}
    pretraining, batch = Pretraining(VLModel(config), built, 0.5), made_batch()
    for objective in built.values():
        objective.begin(pretraining.model)
    counted = step_flops(pretraining, [tuple(batch.ids.shape)], {})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        combine(pretraining(batch)).backward()
    assert counted.training == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_counted_flops_of_heads_that_attend_agree_with_the_counter():
    config = with_tokenizer(brivl_tiny(size=32), TOKENIZER)
    pretraining, batch = Pretraining(VLModel(config), {"clip": CLIPConfig().build(config, TOKENIZER)}), made_batch()
    batch = replace(batch, regions=Regions(box=torch.rand(6, 20, 4), count=torch.full((6,), 20)))
    counted = step_flops(pretraining, [tuple(batch.ids.shape)], {}, regions=20)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        combine(pretraining(batch)).backward()
    assert counted.training == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_hard_negatives_are_counted_without_their_backward():
    model, batch = VLModel(CONFIG), made_batch()
    pretraining = Pretraining(model, {"itm": ITMConfig(candidates=4).build(CONFIG, TOKENIZER)})
    counted = step_flops(pretraining, [tuple(batch.ids.shape)], {"itm/match": 12})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        combine(pretraining(batch)).backward()
    assert counted.training == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(("length", "flm", "one"), [(50, 55.5, 27.4), (14, 26.7, 18.0)])
def test_the_published_size_costs_what_was_worked_out_by_hand(length, flm, one):
    """GFLOPs of one pair at 288 px; worked out with the projections alone, so within 3 %."""
    tokenizer = SimpleNamespace(vocab_size=50265, pad=1, bos=0, eos=2, mask=50264)
    config = with_tokenizer(flm_base(), tokenizer)
    image, seen = image_flops(config.image, 1), config.image.tokens
    stream = text_flops(config, 1, seen, 1, length) + head_flops(config, length)
    both = text_flops(config, 1, seen, 2, length) + head_flops(config, 3 * length)
    both += reconstructor_flops(config, 1, length, length)
    assert (image + stream).forward / 1e9 == pytest.approx(one, rel=0.03)
    assert (image + both).forward / 1e9 == pytest.approx(flm, rel=0.03)


def test_bytes_peaks_and_memory():
    assert adamw_bytes(10) == 280
    assert peak_flops("cpu") is None
    assert peak_memory("cpu") > 50e6


def test_peaks_are_found_by_the_name_of_the_device(monkeypatch):
    for name, peak in [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Riva 128", None)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops("cuda:0") == peak
