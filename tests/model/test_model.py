"""The model's readings agree with each other: cached decoding, folding of directions, patches that are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.batch import Batch
from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.directions import reverse_text
from fastvlp.model.encoders.vit import patchify, resize_positions
from fastvlp.model.keep import random_keep
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import flm_base, small, tiny, with_tokenizer
from fastvlp.objectives.flm import FLM, FLMConfig
from fastvlp.objectives.objective import combine
from tests.made import made_batch, made_config, made_model, made_tokenizer


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_decoding_step_by_step_equals_one_causal_read(norm):
    model, batch = made_model(norm=norm).double(), made_batch(lengths=(9, 9, 9))
    image = model.encode_image(batch.image)
    whole = model.read(image, batch.ids, causal=True)
    cache = model.begin(image)
    for i in range(9):
        assert torch.allclose(model.step(batch.ids[:, i], cache), whole[:, i], atol=1e-10)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_forward_stream_is_the_causal_read(norm):
    """FLM's forward stream and the AR baseline are the same network."""
    model, batch = made_model(norm=norm).double(), made_batch(lengths=(9, 4, 7))
    image = model.encode_image(batch.image)
    streams = model.streams(image, batch.ids, batch.length)
    forward = model.fusion.norm(streams.top[-1].unflatten(0, (3, 2))[:, 0])
    read = model.read(image, batch.ids, causal=True)
    real = torch.arange(9) < batch.length[:, None]
    assert torch.allclose(forward[real], read[real], atol=1e-10)


def test_reversing_a_text_is_its_own_inverse_and_leaves_padding():
    ids = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 10, 2]])
    length = torch.tensor([4, 6])
    flipped = reverse_text(ids, length)
    assert flipped.tolist() == [[2, 6, 5, 1, 0, 0], [2, 10, 9, 8, 7, 1]]
    assert torch.equal(reverse_text(flipped, length), ids)


def test_several_texts_share_one_image():
    model, batch = made_model().double(), made_batch(lengths=(6, 6, 6, 6))
    image = model.encode_image(batch.image[:2])
    shared = model.read(image, batch.ids, mask=masks.full(batch.length, 6))
    apart = model.read(image.repeat_interleave(2, 0), batch.ids, mask=masks.full(batch.length, 6))
    assert torch.allclose(shared, apart, atol=1e-10)


@pytest.mark.parametrize("reading", ["full", "causal", "flm"])
def test_a_summary_sees_every_word_and_no_padding(reading):
    model, batch = made_model().double(), made_batch(lengths=(7, 5))
    image = model.encode_image(batch.image)
    before = model.summarise(image, batch.ids, batch.length, reading=reading)
    for j in range(1, 7):
        ids = batch.ids.clone()
        ids[:, j] = (ids[:, j] + 1) % 30 + 4
        changed = (model.summarise(image, ids, batch.length, reading=reading) != before).any(-1)
        assert changed.tolist() == [True, j < 5]


def test_a_second_image_is_read_under_its_own_type():
    model, batch = made_model(), made_batch(lengths=(5, 5))
    image = model.encode_image(batch.image)
    slots = torch.tensor([0, 1])
    plain = model.summarise(image, batch.ids, batch.length, reading="full")
    typed = model.summarise(image, batch.ids, batch.length, reading="full", slot_B=slots)
    assert torch.equal(plain[0], typed[0]) and not torch.equal(plain[1], typed[1])


def test_patches_are_those_of_a_convolution():
    model = made_model()
    image = torch.randn(2, 3, 16, 16)
    kernel = model.image.patch.weight.reshape(-1, 3, 8, 8)
    convolved = torch.nn.functional.conv2d(image, kernel, model.image.patch.bias, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(model.image.patch(patchify(image, 8)), convolved, atol=1e-5)


def test_keeping_all_patches_changes_nothing_and_dropping_leaves_no_trace():
    model, batch = made_model().double(), made_batch(lengths=(5, 5))
    every = torch.arange(4).expand(2, 4)
    assert torch.allclose(model.encode_image(batch.image), model.encode_image(batch.image, every), atol=1e-12)
    keep = random_keep(batch.seed, 4, 0.5)
    assert keep.shape == (2, 2) and (keep[:, 1] > keep[:, 0]).all()
    image = batch.image.clone()
    for row in range(2):
        for patch in set(range(4)) - set(keep[row].tolist()):
            y, x = divmod(patch, 2)
            image[row, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] = 77
    assert torch.equal(model.encode_image(batch.image, keep), model.encode_image(image, keep))


def test_positions_resize_and_keep_the_class_token():
    weight = torch.randn(17, 6)
    assert resize_positions(weight, 4, 1) is weight
    larger = resize_positions(weight, 6, 1)
    assert larger.shape == (37, 6) and torch.equal(larger[0], weight[0])


def replaced(value, path, to):
    name, _, rest = path.partition(".")
    return replace(value, **{name: replaced(getattr(value, name), rest, to) if rest else to})


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        ("image.size", 20, "whole number of patches of 8"),
        ("text.layer.heads", 5, r"model\.text\.layer\.width` 32 .* 5 heads"),
        ("fusion.layer.width", 16, r"model\.fusion\.layer\.width` 16 must equal"),
        ("reconstructor.bottom", 3, "bottom 3"),
    ],
)
def test_parts_that_do_not_fit_are_named(path, to, message):
    with pytest.raises(UserError, match=message):
        VLModel(replaced(made_config(), path, to))


def test_official_and_blind_starts_are_read_as_they_were_trained():
    """Words see an official <s> no more than in pretraining; a blind one is seen by all."""
    model, batch = made_model(), made_batch(lengths=(7, 5))
    image_BKD, other = model.encode_image(batch.image), batch.ids.clone()
    other[:, 0] = 9
    for bos in ("blind", "official"):
        read = [model.read_causally(image_BKD, ids, batch.length, bos=bos)[:, 1:4] for ids in (batch.ids, other)]
        assert torch.equal(*read) == (bos == "official")
        summaries = [
            model.summarise(image_BKD, ids, batch.length, reading="causal", bos=bos) for ids in (batch.ids, other)
        ]
        assert torch.equal(*summaries) == (bos == "official")


def test_a_model_without_reconstructor_says_so():
    model, batch = made_model(reconstructor=False), made_batch(lengths=(5,))
    with pytest.raises(UserError, match="no reconstructor"):
        model.streams(model.encode_image(batch.image), batch.ids, batch.length)


@pytest.mark.parametrize(("bottom", "top"), [(1, 2), (0, 1), (2, 1)])
def test_a_shorter_reconstructor_reads_the_last_layers(bottom, top):
    config = made_config()
    config = replace(config, reconstructor=replace(config.reconstructor, bottom=bottom, top=top))
    torch.manual_seed(0)
    model, batch = VLModel(config), made_batch(lengths=(7, 5))
    used: list[int] = []
    streams = model.streams(model.encode_image(batch.image), batch.ids, batch.length)
    for i, norm in enumerate([*model.reconstructor.bottom_key_norm, *model.reconstructor.top_key_norm]):
        norm.register_forward_pre_hook(lambda module, args, i=i: used.append(id(args[0])))
    FLM(FLMConfig()).queries(batch, (torch.arange(7).expand(2, 7), torch.arange(1, 8).expand(2, 7)), streams, model)
    assert used == [id(s) for s in streams.bottom[2 - bottom :] + streams.top[2 - top :]]


@pytest.mark.parametrize("size", [tiny, small, flm_base])
def test_sizes_build(size):
    """The paper's size has the parameters that its authors count (arXiv 2303.14038): about 345 M with RoBERTa's vocabulary."""
    config = with_tokenizer(size(), made_tokenizer())
    assert config.text.vocab == 40
    with torch.device("meta"):
        model = VLModel(config)
    count = sum(p.numel() for p in model.parameters())
    if size is flm_base:
        vocabulary = 2 * (50265 - 40) * 768 + (50265 - 40)
        assert count + vocabulary == pytest.approx(345e6, rel=0.01)


def test_gradients_reach_every_parameter_that_flm_uses():
    model = made_model()
    batch = made_batch(lengths=(9, 4, 7))
    batch = Batch(**{f: getattr(batch, f) for f in ("image", "ids", "length", "seed")}, slot=None)
    combine(FLM(FLMConfig())(model, model.encode_image(batch.image), batch)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
