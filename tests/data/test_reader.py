"""One reader for training, evaluation, tasks and inspection: what a record's images and regions are."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.data.reader import RecordReader
from fastvlp.data.records import decode as decode_file
from fastvlp.data.records.decode import StoredShape, decode, stored_shape
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import RegionSource
from fastvlp.errors import UserError

SQUARE = Transform(size=16, mode="squash")


def jpeg(seed: int, width: int = 40, height: int = 20) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    objects = [{"class": "c", "box": [0, 0, 20, 20], "image": k} for k in (0, 1, 1)]
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder) as writer:
        writer.write(Record(key="one", images=(jpeg(0),), info={"objects": objects[:1]}))
        writer.write(Record(key="pair", images=(jpeg(1), jpeg(2, 20, 20)), info={"objects": objects}))
        writer.write(Record(key="cut", images=(jpeg(3)[:200],), info={}))
    return Shards(folder)


@pytest.mark.parametrize("cache", [False, True])
def test_images_and_regions_are_those_of_the_images_in_use(shards: Shards, cache: bool) -> None:
    whole = decode(shards.read(1), SQUARE).images
    both = RecordReader(shards, SQUARE, images=2, regions=RegionSource(), cache=cache)
    first = RecordReader(shards, SQUARE, regions=RegionSource(), cache=cache)
    for _ in range(2):  # the second time from the cache
        record = both.record(1)
        assert torch.equal(torch.stack(record.images), whole)
        assert [len(regions.box_R4) for regions in record.regions] == [1, 2]
        assert record.shapes == [(20, 40, 1), (20, 20, 1)]
        (image,), (regions,) = first.record(1).images, first.record(1).regions
        assert torch.equal(image, whole[0]) and regions.box_R4.tolist() == [[0, 0, 0.5, 1]]
    assert RecordReader(shards, SQUARE).record(1).regions == []


def test_all_images_are_those_that_there_are(shards: Shards) -> None:
    reader = RecordReader(shards, SQUARE, images="all")
    assert [len(reader.record(i).images) for i in (0, 1)] == [1, 2]
    assert reader.record(1).encoded == shards.read(1).images


def test_another_number_of_images_is_an_error(shards: Shards) -> None:
    with pytest.raises(RecordError, match="one: has 1 images, 2"):
        _ = RecordReader(shards, SQUARE, images=2).record(0).images


def test_boxes_are_placed_where_the_model_sees_them(shards: Shards) -> None:
    record = RecordReader(shards, Transform(size=16)).record(0)
    assert record.visible_boxes(torch.tensor([[10.0, 0, 20, 10], [0, 0, 5, 5]])).tolist() == [
        [0, 0, 0.5, 0.5],
        [0, 0, 0, 0.25],
    ]


def test_an_unusable_record_is_named_or_refused(shards: Shards) -> None:
    reader = RecordReader(shards, SQUARE)
    images, dropped = reader.read_each(lambda i: reader.record(i).images[0], [2, 0])
    assert len(images) == 1 and [one.key for one in dropped] == ["cut"] and isinstance(dropped[0], Dropped)
    strict = RecordReader(shards, SQUARE, strict=True)
    with pytest.raises(UserError, match="1 records cannot be used"):
        strict.read_each(lambda i: strict.record(i).images[0], [2, 0])


def test_damaged_shards_are_refused_where_nothing_may_be_left_out(shards: Shards, tmp_path: Path) -> None:
    data = (Path(shards.url) / "00000.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: data.index(b"cut.jpg") + 600])
    damaged = Shards(tmp_path)
    assert RecordReader(damaged, SQUARE).record(0).images
    with pytest.raises(UserError, match=r"0\.tar"):
        RecordReader(damaged, SQUARE, strict=True)


def test_a_pickled_reader_starts_with_an_empty_cache(shards: Shards) -> None:
    reader = RecordReader(shards, SQUARE, cache=True)
    image = reader.record(0).images[0]
    copy = pickle.loads(pickle.dumps(reader))
    assert 0 in reader.cache and 0 not in copy.cache
    assert torch.equal(copy.record(0).images[0], image)


def test_a_large_image_is_an_error_before_it_is_decoded(shards: Shards) -> None:
    with pytest.raises(RecordError, match="40x20 pixels"):
        _ = RecordReader(shards, SQUARE, max_pixels=100).record(0).images


def test_the_head_of_an_image_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # lies on its side
    Image.open(io.BytesIO(jpeg(0))).save(file, "JPEG", exif=exif)
    with ShardWriter(tmp_path) as writer:
        writer.write(Record(key="turned", images=(file.getvalue(),), info={}))
    opened, own = [], decode_file.open_image
    monkeypatch.setattr(decode_file, "open_image", lambda data: opened.append(1) or own(data))
    record = RecordReader(Shards(tmp_path), SQUARE, cache=True).record(0)
    assert len(record.images) == 1 and record.shapes == [StoredShape(20, 40, 6)]
    assert len(opened) == 1
    assert record.shapes == [stored_shape(file.getvalue())]
