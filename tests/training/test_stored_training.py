"""Training on stored states of a frozen image encoder: the losses are those of encoding at each step."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.batch import Record
from fastvlp.data.augment import AugmentConfig
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.regions import RegionSource
from fastvlp.data.state_store import StatesConfig
from fastvlp.data.states_file import StatesFile
from fastvlp.errors import UserError
from fastvlp.model.encoders.text_transformer import TextTransformer
from fastvlp.model.encoders.vit import ViT
from fastvlp.model.joint_space import Head, HeadConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.region_pooling import RegionPool
from fastvlp.model.sizes import single_over_patches
from fastvlp.objectives.ar import ARConfig
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.objectives.region import MRFRConfig
from fastvlp.objectives.wra import WRAConfig
from fastvlp.training.checkpoint import save
from fastvlp.training.loop import start, steps, train, validate
from fastvlp.training.train_config import TrainConfig
from fastvlp.training.trained_parts import LastLayers
from tests.training.runs import OBJECTIVES, assert_equal, made_pairs, made_records, made_run, weights

FP32 = StatesConfig(store="always", dtype="fp32")
FP16 = StatesConfig(store="always")
NEVER = StatesConfig(store="never")


@pytest.fixture
def pairs(tmp_path) -> Path:
    return made_pairs(tmp_path / "pairs")


def with_boxes(folder: Path) -> Path:
    """Pairs with two objects in each picture."""
    for split, count, seed in (("train", 24, 0), ("val", 6, 1)):
        with ShardWriter(folder / split) as writer:
            for i, record in enumerate(made_records(count, seed)):
                boxes = [[0, 0, 4 + i % 8, 9], [3, 2, 15, 6 + i % 7]]
                objects = [{"class": "red", "box": box} for box in boxes]
                writer.write(Record(key=record.key, images=record.images, info={**record.info, "objects": objects}))
    return folder


def family(name: str, folder: Path, out: Path) -> TrainConfig:
    """A run of each kind of objective on a frozen image encoder."""
    if name in ("moco boxes", "moco grid"):
        pairs = with_boxes(folder / "boxes")
        run = made_run(pairs, out, "moco")
        layer = LayerConfig(width=32, heads=4, hidden=64)
        pool = RegionPool(samples=2, grid=2 if name == "moco grid" else None)
        head = replace(run.model.embed.image, pool="mean", regions=pool, depth=1, layer=layer)
        run = replace(run, model=replace(run.model, embed=replace(run.model.embed, image=head)))
        run = replace(run, data=replace(run.data, regions=RegionSource() if name == "moco boxes" else None))
    elif name == "single":
        pairs = with_boxes(folder / "boxes")
        run = made_run(pairs, out, "mlm")
        run = replace(
            run,
            model=single_over_patches(run.model),
            data=replace(run.data, regions=RegionSource(grid=2)),
            objectives={"mlm": OBJECTIVES["mlm"], "mrfr": MRFRConfig(), "itm": WRAConfig()},
            mix={"mlm": 1, "mrfr": 1, "itm": 1},
        )
    else:
        run = made_run(made_pairs(folder / "pairs"), out, *(part for part in name.split("+") if part in OBJECTIVES))
        more = {"itm": ITMConfig(candidates=2), "ar": ARConfig()}
        run = replace(run, objectives={part: OBJECTIVES.get(part) or more[part] for part in name.split("+")})
    return replace(run, freeze=("image",))


PAIRS = ("clip", "siglip", "moco", "albef", "moco boxes", "moco grid")
FAMILIES = (*PAIRS, "flm", "mlm+itm", "ar", "prefixlm", "single", "clip+flm")
# Like another one in what they read of images and texts.
ALIKE = {"siglip", "albef", "ar", "prefixlm"}


def losses(run: TrainConfig, states: StatesConfig) -> list[dict[str, float]]:
    """Returns the losses of three steps, which are an epoch, and of a validation."""
    state = start(replace(run, states=states, steps=3))
    found = [report.losses for report in steps(state)] + [validate(state)]
    stored = state.stored is not None and all(note.path is not None for note in state.stored.notes)
    assert stored == (states.store == "always")
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in FAMILIES]
)
def test_losses_are_those_of_encoding_at_each_step(name, tmp_path):
    """Bit for bit where the states are stored in single precision; else within the rounding of half precision, 2**-11."""
    run = family(name, tmp_path, tmp_path / "run")
    encoded = losses(run, NEVER)
    assert losses(run, FP32) == encoded
    for stored, exact in zip(losses(run, FP16), encoded, strict=True):
        assert stored == pytest.approx(exact, rel=5e-3)


def test_a_mirrored_image_has_stored_states_too(pairs, tmp_path):
    """For rows that `augment` mirrors, the states of the mirrored images are read."""
    run = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("image",), augment=AugmentConfig(flip=0.5))
    encoded = losses(run, NEVER)
    assert losses(run, FP32) == encoded != losses(replace(run, augment=AugmentConfig()), FP32)
    # Of the training images two files; of those that validate, one.
    assert [len([*(pairs / split).glob("states-*")]) for split in ("train", "val")] == [2, 1]


def text_head(run: TrainConfig, **changes) -> TrainConfig:
    """`depth` or `pool` are of the head, the rest of the joint space."""
    layer = LayerConfig(width=32, heads=4, hidden=64)
    own = {name: changes.pop(name) for name in ("depth", "pool", "norm") if name in changes}
    head = replace(run.model.embed.text, layer=layer if {"depth", "pool"} & {*own} else None, **own)
    return replace(run, model=replace(run.model, embed=replace(run.model.embed, text=head, **changes)))


TEXTS = {
    "last": {},
    "first": {"pool": "first", "text_mask": "full"},
    "mean": {"pool": "mean", "norm": False},
    "mean of normed": {"pool": "mean"},
    "words alone": {"pool": "mean", "norm": False, "text_special": False, "text_mask": "full"},
    "padding seen": {"pool": "end", "text_mask": "none", "text_length": 12, "text_start": False},
    "layers": {"pool": "mean", "depth": 1, "text_mask": "full"},
    "attention": {"pool": "attention", "text_mask": "full"},
}


@pytest.mark.parametrize("objective", ["clip", pytest.param("moco", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reading", TEXTS)
def test_losses_on_stored_texts_are_those_of_encoding_at_each_step(pairs, tmp_path, objective, reading):
    """Texts are encoded in other batches, so that the last bits differ."""
    run = text_head(made_run(pairs, tmp_path / "run", objective), **TEXTS[reading])
    run = replace(run, freeze=("image", "text"))
    encoded = losses(run, NEVER)
    for states, tolerance in ((FP32, 1e-5), (FP16, 5e-3)):
        for stored, exact in zip(losses(run, states), encoded, strict=True):
            assert stored == pytest.approx(exact, rel=tolerance)
    condensed = reading not in ("mean of normed", "layers", "attention")
    (texts, _) = (
        StatesFile(note.path) for note in start(replace(run, states=FP16)).stored.notes if note.what == "texts"
    )
    assert len(texts) == 48 and (set(texts.lengths()) == {1}) == condensed


def test_a_frozen_text_encoder_alone_is_stored(pairs, tmp_path, monkeypatch):
    run = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("text",), states=FP16)
    state = start(run)
    assert [note.what for note in state.stored.notes] == ["texts", "texts"]
    monkeypatch.setattr(TextTransformer, "states", None)
    list(steps(state))
    validate(state)


def test_other_tokens_make_another_file(pairs, tmp_path):
    run = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("text",), states=FP16)
    runs = [
        run,
        replace(run, vocab=50),
        replace(run, data=replace(run.data, max_length=10)),
        text_head(run, text_mask="full"),
    ]
    assert len({start(one).stored.notes[0].path for one in runs}) == 4


def test_texts_that_are_read_beside_images_are_not_stored(pairs, tmp_path):
    run = replace(made_run(pairs, tmp_path / "run", "mlm"), freeze=("image", "text"), states=FP16)
    texts, *images = start(run).stored.notes
    assert texts.what == "texts" and not texts.path and {note.what for note in images} == {"images"}
    clip = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("text",))
    assert start(text_head(clip, text_mask="none")).stored.texts is None
    masked = {"clip": CLIPConfig(text_keep=0.5)}
    assert start(replace(text_head(clip, text_length=12), objectives=masked)).stored.texts is None


class Counted(torch.nn.Module):
    """Counts the images that an encoder gets."""

    images = 0


@pytest.fixture
def encoded(monkeypatch) -> type[Counted]:
    forward = ViT.forward

    def counting(self, image, keep_BK=None):
        Counted.images += len(image)
        return forward(self, image, keep_BK)

    monkeypatch.setattr(ViT, "forward", counting)
    Counted.images = 0
    return Counted


@pytest.mark.parametrize("names", [("clip",), ("moco",), ("flm", "clip")], ids="-".join)
def test_nothing_is_decoded_or_encoded_again(pairs, tmp_path, encoded, monkeypatch, names):
    run = replace(made_run(pairs, tmp_path / "run", *names), freeze=("image",), states=FP16)
    state = start(run)
    # And a blank image, whose states are checked at the start.
    assert encoded.images == 24 + 6 + 1
    monkeypatch.setattr("fastvlp.data.reader.decoded_with_shapes", None)
    list(steps(state))
    validate(state)
    assert encoded.images == 24 + 6 + 1


def sizes(state) -> list[int]:
    """States of an image in each file."""
    return [int(StatesFile(note.path).lengths()[0]) for note in state.stored.notes]


def test_of_a_pooled_image_one_state_is_stored(pairs, tmp_path):
    """The mean of all; of the map without its class token two, since the head leaves out the first one."""
    clip = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("image",), states=FP16)
    assert sizes(start(clip)) == [1, 1]
    head = replace(clip.model.embed.image, pool="patches")
    patches = replace(clip, model=replace(clip.model, embed=replace(clip.model.embed, image=head)))
    assert losses(patches, FP32) == losses(patches, NEVER)
    assert sizes(start(patches)) == [2, 2]
    both = replace(made_run(pairs, tmp_path / "run", "clip", "mlm"), freeze=("image",), states=FP16)
    assert sizes(start(both)) == [5, 5]


@pytest.mark.parametrize("pool", ["first", "end", "last", "mean", "patches"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_head_makes_the_same_of_condensed_states(pool, norm):
    torch.manual_seed(0)
    head = Head(HeadConfig(pool=pool, norm=norm), 8, 4).double()
    assert head.condenses == (not norm or pool in ("first", "end", "last"))
    if not head.condenses:
        return
    state, length = torch.randn(3, 5, 8, dtype=torch.float64), torch.tensor([5, 2, 1])
    torch.testing.assert_close(head(head.condensed(state)), head(state))
    condensed = head.condensed(state, length)
    assert condensed.shape[1] == (2 if pool == "patches" else 1)
    torch.testing.assert_close(head(condensed, length.clamp(max=condensed.shape[1])), head(state, length))


def test_a_resumed_run_ends_as_an_uninterrupted_one(pairs, tmp_path):
    """Its states are those of the saved weights, whatever it would begin with."""
    whole = replace(made_run(pairs, tmp_path / "whole", "moco", "mlm"), freeze=("image",), states=FP16)
    first = train(whole)
    half = replace(whole, out=str(tmp_path / "half"), steps=3)
    before = train(replace(half, init=str(tmp_path / "whole"))).stored.notes[0].path
    resumed = train(replace(half, steps=6), resume=True)
    assert [note.seconds for note in resumed.stored.notes] == [0, 0]
    assert resumed.stored.notes[0].path == before == first.stored.notes[0].path
    with pytest.raises(UserError, match=r"states\.dtype: fp16 then, fp32 now"):
        train(replace(half, steps=8, states=FP32), resume=True)
    train(replace(half, steps=8, states=replace(FP16, folder=str(tmp_path / "states"))), resume=True)
    assert len([*(tmp_path / "states").iterdir()]) == 2


def test_two_halves_are_a_whole(pairs, tmp_path):
    whole = replace(made_run(pairs, tmp_path / "whole", "moco", "mlm"), freeze=("image",), states=FP16)
    half = replace(whole, out=str(tmp_path / "half"))
    state = train(whole)
    stopped = start(half)
    for report in steps(stopped):
        if report.step == 3:
            break
    save(stopped)
    assert_equal(weights(train(half, resume=True)), weights(state))


@pytest.mark.parametrize(
    ("objective", "changes", "reason"),
    [
        ("clip", {"freeze": ()}, "no encoder is frozen"),
        ("clip", {"freeze": ("image.blocks",)}, "no encoder is frozen"),
        ("clip", {"keep": 0.5}, "leaves out other patches"),
        ("clip", {"augment": AugmentConfig(flip=0.5, gray=0.2)}, "`augment` changes"),
        ("simclr", {}, "simclr reads their pixels"),
        ("moco", {"objectives": {"moco": MoCoConfig(queue=24, key_keep=0.5)}}, "moco reads their pixels"),
    ],
)
def test_where_pixels_are_needed_no_states_are_stored(pairs, tmp_path, objective, changes, reason):
    run = replace(made_run(pairs, tmp_path / "run", objective), **{"freeze": ("image",), **changes})
    stored = start(run).stored
    if run.freeze == ("image",):
        assert stored.images is stored.texts is None and re.search(reason, str(*stored.notes))
    else:
        assert stored is None
    with pytest.raises(UserError, match=f"`states.store` is always.*{reason}"):
        start(replace(run, states=FP16))
    assert not [*pairs.rglob("states-*")]


def test_by_itself_a_run_stores_what_it_reads_twice(pairs, tmp_path):
    run = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("image",))
    once = start(replace(run, steps=5))
    assert [note.path is None for note in once.stored.notes] == [True, False]
    assert start(replace(run, steps=6)).stored.notes[0].path is not None
    assert start(replace(run, train_last=LastLayers(image=0), freeze=(), steps=6)).stored.notes[0].path is not None


def test_the_start_says_what_is_stored(pairs, tmp_path):
    run = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("image",))
    train(run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    stored = [line for line in lines if line["kind"] == "states"]
    assert [line["entries"] for line in stored] == [24, 6]
    assert all(Path(line["path"]).stat().st_size == line["size"] and line["seconds"] > 0 for line in stored)


@pytest.mark.slow
def test_other_weights_make_another_file(pairs, tmp_path):
    run = replace(made_run(pairs, tmp_path / "run", "clip"), freeze=("image",), states=FP16)
    paths = [start(replace(run, seed=seed)).stored.notes[0].path for seed in (0, 1)]
    assert paths[0] != paths[1]
    squash = replace(run, data=replace(run.data, fit="squash"))
    assert start(squash).stored.notes[0].path not in paths
