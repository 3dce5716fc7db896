import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.batch import Batch, Record, Regions
from fastvlp.data.decode import ORIENTATION, Stored, decode, stored
from fastvlp.data.loader import Loader, PairMaker, Row
from fastvlp.data.random import hash64
from fastvlp.data.regions import RegionSource, pad_regions, read_regions
from fastvlp.data.rows import PairData
from fastvlp.data.shards import RecordError, Shards, ShardWriter
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.transform import Transform
from fastvlp.errors import UserError

SQUASH = Transform(size=16, mode="squash")
WIDE = Stored(50, 100, 1)


def thing(*box, name="cat", **more):
    return {"class": name, "box": list(box), **more}


def read(source, *objects, at=WIDE, transform=SQUASH):
    return read_regions(source, "r", {"objects": list(objects)}, at, transform)


def close(a, b):
    return torch.allclose(a, torch.tensor(b, dtype=torch.float32), atol=1e-6)


def test_a_batch_moves_with_its_regions():
    regions = Regions(box=torch.zeros(2, 3, 4), count=torch.tensor([1, 3]))
    batch = Batch(
        image=torch.zeros(2, 3, 4, 4), ids=torch.zeros(2, 1), length=torch.ones(2), seed=torch.ones(2), regions=regions
    )
    moved = batch.to("meta")
    assert moved.regions.box.device.type == moved.regions.count.device.type == moved.image.device.type == "meta"
    assert moved.slot is None and moved.regions.feature is None


def test_the_mask_leaves_out_padding_and_boxes_without_area():
    box = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 0], [0.2, 0.2, 0.3, 0.3], [0, 0, 1, 1]])
    regions = Regions(box=box.repeat(2, 1, 1), count=torch.tensor([3, 1]))
    assert regions.mask.tolist() == [[True, False, True, False], [True, False, False, False]]


def test_boxes_are_fractions_in_the_listed_order_cut_to_the_first_that_are_seen():
    objects = [
        thing(0, 0, 50, 25),
        thing(120, 0, 140, 20),
        thing(-10, 10, 20, 80),
        thing(30, 5, 30, 9),
        thing(5, 5, 6, 6),
    ]
    found = read(RegionSource(most=2), *objects)
    assert close(found.box_R4, [[0, 0, 0.5, 0.5], [0, 0.2, 0.2, 1]])
    assert found.classes_RC is None
    assert len(read(RegionSource(), *objects).box_R4) == 3


def test_the_whole_image_comes_last():
    found = read(RegionSource(most=1, whole=True), thing(0, 0, 50, 25), thing(0, 0, 10, 10))
    assert close(found.box_R4, [[0, 0, 0.5, 0.5], [0, 0, 1, 1]])


def test_a_crop_drops_the_boxes_that_it_loses():
    found = read(RegionSource(), thing(0, 0, 25, 50), thing(10, 0, 50, 50), transform=Transform(size=16))
    assert close(found.box_R4, [[0, 0, 0.5, 1]])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("info", [{}, {"objects": []}, {"objects": [thing(200, 0, 210, 5)]}])
def test_a_record_without_a_region_is_dropped_or_shown_whole(info, whole):
    with pytest.raises(RecordError, match=r"none of its \d objects is in the picture"):
        read_regions(RegionSource(whole=whole), "r", info, WIDE, SQUASH)
    found = read_regions(RegionSource(whole=whole, empty="whole"), "r", info, WIDE, SQUASH)
    assert close(found.box_R4, [[0, 0, 1, 1]])


@pytest.mark.parametrize("box", [[0, 0, 1], [0, 0, math.nan, 1], [5, 0, 1, 1], ["0", 0, 1, 1], None])
def test_a_bad_box_spoils_its_record(box):
    with pytest.raises(RecordError, match=r"field objects: box .* is not four numbers"):
        read(RegionSource(), thing(0, 0, 9, 9), {"class": "cat", "box": box})


@pytest.mark.parametrize("objects", [3, None, ["cat"], [{"box": [0, 0, 1, 1]}]])
def test_objects_are_objects(objects):
    with pytest.raises(RecordError, match="field objects is not a list of objects with class and box"):
        read_regions(RegionSource(), "r", {"objects": objects}, WIDE, SQUASH)


def test_of_a_pair_the_first_image_is_read():
    found = read(RegionSource(), thing(0, 0, 10, 10, image=1), thing(0, 0, 50, 25, image=0))
    assert close(found.box_R4, [[0, 0, 0.5, 0.5]])


def test_a_grid_goes_down_its_columns_and_ends_with_the_whole():
    found = read_regions(RegionSource(grid=2), "r", {"objects": 7}, WIDE, SQUASH)
    expected = [[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]]
    assert close(found.box_R4, expected)
    assert len(read_regions(RegionSource(grid=6), "r", {}, WIDE, SQUASH).box_R4) == 37


def test_class_shares_are_the_records_over_the_named_classes():
    source = RegionSource(classes=("cat", "dog", "bird"), whole=True)
    told = {"cat": 0.6, "dog": 0.2, "plane": 0.2}
    objects = [
        thing(0, 0, 9, 9, class_distribution=told),
        thing(200, 0, 210, 9, name="bird"),
        thing(0, 0, 9, 9, name="dog"),
        thing(0, 0, 9, 9, name="plane"),
    ]
    assert close(read(source, *objects).classes_RC, [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(RecordError, match=r"field objects: class_distribution .* is not {class: share of 0 or more}"):
        read(source, thing(0, 0, 9, 9, class_distribution={"cat": -1}))


def test_rows_are_padded_to_the_longest():
    source = RegionSource(classes=("cat",))
    found = [read(source, *[thing(0, 0, 50, 50)] * n) for n in (1, 3, 2)]
    regions = pad_regions(found)
    assert regions.box.shape == (3, 3, 4) and regions.classes.shape == (3, 3, 1)
    assert regions.count.dtype == torch.int64 and regions.count.tolist() == [1, 3, 2]
    assert regions.mask.sum(1).tolist() == [1, 3, 2]
    assert regions.feature is None and regions.box[0, 1:].eq(0).all() and regions.classes[0, 1:].eq(0).all()


def test_bad_settings_are_refused():
    for bad in ({"most": 0}, {"grid": 0}, {"grid": 2, "classes": ("cat",)}, {"empty": "keep"}):
        with pytest.raises(UserError, match="regions"):
            RegionSource(**bad)


@pytest.mark.parametrize("mode", ["crop", "squash", "letterbox"])
@pytest.mark.parametrize("turn", range(9))
def test_boxes_lie_where_the_model_sees_the_object(mode, turn):
    """A white rectangle in a stored image that EXIF turns, read back as the pixels of the decoded one."""
    pixels = np.zeros((96, 160, 3), dtype=np.uint8)
    x0, y0, x1, y1 = box = (48, 16, 72, 64)
    pixels[y0:y1, x0:x1] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95, exif=exif)
    transform = Transform(size=96, mode=mode, fill=0)
    record = Record(key="r", images=(out.getvalue(),), info={"objects": [thing(*box)]})
    image = decode(record, transform).images[0, 0]
    found = read_regions(RegionSource(), "r", record.info, stored(record.images[0]), transform).box_R4[0]
    bright = (image > 127).nonzero()
    seen = torch.cat([bright.amin(0).flip(0), bright.amax(0).flip(0) + 1]) / 96
    assert (seen - found).abs().max() < 1.01 / 96


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a cat", "two dogs"] * 3, vocab_size=60)


def png(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((10 + i, 20, 3), 9 * i, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def split(folder, objects) -> Shards:
    with ShardWriter(folder) as writer:
        for i, told in enumerate(objects):
            writer.write(Record(key=f"p{i}", images=(png(i),), info={"captions": ["a cat"], "objects": told}))
    return Shards(folder)


def rows(n: int) -> list[Row]:
    return [Row(i, hash64(0, 0, i)) for i in range(n)]


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_keep_their_boxes(tmp_path, tokenizer, workers):
    shards = split(tmp_path, [[thing(0, 0, 10, 8)] * (i + 1) for i in range(5)])
    runs = []
    for cache in (False, True):
        maker = PairMaker(shards, Transform(size=8), tokenizer, max_length=9, cache=cache, regions=RegionSource())
        iterator = Loader(5, maker, batch_size=2, seed=0, workers=workers if cache else 0).batches()
        runs.append([next(iterator)[0].regions for _ in range(12)])
        iterator.close()
        if cache:
            assert all(maker.cache.get(i) is not None for i in range(5))
    for a, b in zip(*runs):
        assert torch.equal(a.box, b.box) and torch.equal(a.count, b.count)
    alone = maker(rows(5)[1:2])[0].regions
    together = maker(rows(5))[0].regions
    assert torch.equal(alone.box[0], together.box[1, :2]) and together.count.tolist() == [1, 2, 3, 4, 5]


def test_a_bad_box_drops_its_record_by_name_and_stops_an_evaluation(tmp_path, tokenizer):
    shards = split(tmp_path, [[thing(0, 0, 9, 9)], [thing(9, 0, 0, 9)], []])
    given = {"max_length": 9, "regions": RegionSource()}
    batch, dropped = PairMaker(shards, SQUASH, tokenizer, **given)(rows(3))
    assert len(batch) == len(batch.regions.box) == 1
    assert [d.key for d in dropped] == ["p1", "p2"]
    assert "set regions.empty to 'whole'" in dropped[1].reason
    with pytest.raises(UserError, match=r"2 records cannot be used \(p1: field objects: box"):
        PairMaker(shards, SQUASH, tokenizer, strict=True, **given)(rows(3))
    assert PairMaker(shards, SQUASH, tokenizer, max_length=9)(rows(3))[0].regions is None
    assert len(PairMaker(shards, SQUASH, tokenizer, max_length=9, regions=RegionSource())(rows(3)[1:])[0]) == 0


def test_pinning_copies_regions_too(tmp_path, tokenizer, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.shape) or t.clone())
    maker = PairMaker(split(tmp_path, [[]]), SQUASH, tokenizer, max_length=9, regions=RegionSource(grid=1))
    next(Loader(1, maker, batch_size=1, seed=0, pin=True).once())
    assert {(1, 2, 4), (1,), (1, 3, 16, 16)} <= set(pinned)


def test_a_recipe_says_which_regions(tmp_path, tokenizer):
    from fastvlp.model.image import ImageConfig
    from fastvlp.model.layers import LayerConfig

    split(tmp_path, [[thing(0, 0, 9, 9)]])
    image = ImageConfig(size=8, patch=4, depth=1, layer=LayerConfig(width=8, heads=1, hidden=8))
    data = PairData(train=str(tmp_path), batch_size=1, regions=RegionSource(grid=3))
    batch, _ = data.rows("train", tokenizer, image, strict=True).make(rows(1))
    assert batch.regions.box.shape == (1, 10, 4)
    assert json.dumps(batch.regions.count.tolist()) == "[10]"
