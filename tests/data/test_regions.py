import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.batch import Batch, Record, Regions
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import PairData, PairMaker
from fastvlp.data.records.decode import ORIENTATION, StoredShape, decode, stored_shape
from fastvlp.data.records.detections import Detections, check_arrays, pack, unpack
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import RegionSource, pad_regions, read_regions, region_count
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.random import hash64

SQUASH = Transform(size=16, mode="squash")
WIDE = StoredShape(50, 100, 1)


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
    with pytest.raises(RecordError, match=r"\d objects"):
        read_regions(RegionSource(whole=whole), "r", info, WIDE, SQUASH)
    found = read_regions(RegionSource(whole=whole, empty="whole"), "r", info, WIDE, SQUASH)
    assert close(found.box_R4, [[0, 0, 1, 1]])


@pytest.mark.parametrize("box", [[0, 0, 1], [0, 0, math.nan, 1], [5, 0, 1, 1], ["0", 0, 1, 1], None])
def test_a_record_with_a_bad_box_is_an_error(box):
    with pytest.raises(RecordError, match=r"field objects: box .* is not four numbers"):
        read(RegionSource(), thing(0, 0, 9, 9), {"class": "cat", "box": box})


@pytest.mark.parametrize("objects", [3, None, ["cat"], [{"box": [0, 0, 1, 1]}]])
def test_objects_must_be_a_list_of_objects(objects):
    with pytest.raises(RecordError, match="field objects is not a list of objects with class and box"):
        read_regions(RegionSource(), "r", {"objects": objects}, WIDE, SQUASH)


def test_the_first_image_of_a_pair_is_read():
    found = read(RegionSource(), thing(0, 0, 10, 10, image=1), thing(0, 0, 50, 25, image=0))
    assert close(found.box_R4, [[0, 0, 0.5, 0.5]])


def test_a_grid_goes_down_its_columns_and_ends_with_the_whole():
    found = read_regions(RegionSource(grid=2), "r", {"objects": 7}, WIDE, SQUASH)
    expected = [[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]]
    assert close(found.box_R4, expected)
    assert len(read_regions(RegionSource(grid=6), "r", {}, WIDE, SQUASH).box_R4) == 37


def test_class_shares_are_the_records_over_the_named_classes():
    source = RegionSource(classes=("cat", "dog", "bird"), whole=True)
    shares = {"cat": 0.6, "dog": 0.2, "plane": 0.2}
    objects = [
        thing(0, 0, 9, 9, class_distribution=shares),
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


@pytest.mark.parametrize("mode", ["crop", "centre", "squash", "letterbox"])
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
    found = read_regions(RegionSource(), "r", record.info, stored_shape(record.images[0]), transform).box_R4[0]
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
        for i, boxes in enumerate(objects):
            writer.write(Record(key=f"p{i}", images=(png(i),), info={"captions": ["a cat"], "objects": boxes}))
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
            assert all(i in maker.reader.cache for i in range(5))
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
    assert "set `regions.empty` to `whole`" in dropped[1].reason
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
    split(tmp_path, [[thing(0, 0, 9, 9)]])
    data = PairData(train=str(tmp_path), batch_size=1, regions=RegionSource(grid=3))
    batch, _ = data.rows("train", tokenizer, 8, strict=True).make(rows(1))
    assert batch.regions.box.shape == (1, 10, 4)
    assert json.dumps(batch.regions.count.tolist()) == "[10]"


# --- a detector's regions, stored ------------------------------------------------------------------------------------

CONFIDENCES = [0.9, 0.5, 0.3, 0.1, 0.05]


def found_by_a_detector(n: int = 5, *, classes: bool = True) -> Detections:
    """Region i starts at i tenths of the width and says so in its feature; halves and tenths, exact enough."""
    low = np.arange(n)[:, None] / 10
    box = np.concatenate([low, 0 * low, low + 0.2, 0 * low + 0.5], 1).astype(np.float32)
    share = np.full((n, 4), 0.25, np.float32)
    return check_arrays({"norm_bb": box, "features": low + np.zeros((n, 3)), "soft_labels": share if classes else None})


def read_stored(source, found=None, *, confidences=CONFIDENCES, at=WIDE, transform=SQUASH):
    found = found_by_a_detector() if found is None else found
    return read_regions(source, "r", {"confidences": [confidences]}, at, transform, (pack(found),))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"least": 1}, 3),
        ({"least": 4}, 4),
        ({"least": 10}, 5),
        ({"least": 1, "most": 2}, 2),
        ({"least": 1, "confidence": 0.5}, 1),
        ({"least": 2, "most": 2, "confidence": 0}, 2),
    ],
)
def test_as_many_stored_regions_come_as_the_detector_is_sure_of(settings, count):
    """UNITER: clip(number of confidences above the threshold, least, most), the most confident ones. Boxes have six
    columns there, of which the last two are width and height."""
    source = RegionSource(stored=True, **settings)
    found = read_stored(source)
    assert found.box_R4.dtype == torch.float32
    assert close(found.box_R4[:, 0], [i / 10 for i in range(count)])
    assert found.feature_RF.dtype == found.classes_RC.dtype == torch.float16
    assert torch.allclose(found.feature_RF[:, 0].float(), found.box_R4[:, 0], atol=1e-3)
    assert found.feature_RF.shape == (count, 3) and found.classes_RC.shape == (count, 4)
    assert region_count(source, {"confidences": [CONFIDENCES]}) == count


def test_features_go_with_their_boxes_where_a_crop_leaves_some_out():
    """The crop of 100 x 50 pixels shows the columns from 25 to 75: the first region ends at 20, the next is cut."""
    found = read_stored(RegionSource(stored=True), transform=Transform(size=16))
    assert close(found.box_R4, [[0, 0, 0.1, 0.5], [0, 0, 0.3, 0.5], [0.1, 0, 0.5, 0.5], [0.3, 0, 0.7, 0.5]])
    assert torch.allclose(found.feature_RF[:, 0].float(), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=1e-3)


@pytest.mark.parametrize("turn", range(1, 9))
def test_stored_boxes_turn_as_objects_do(turn):
    at = StoredShape(50, 100, turn)
    boxes = [[round(100 * x) for x in (i / 10, 0, i / 10 + 0.2)] + [25] for i in range(5)]
    as_objects = read(RegionSource(), *[thing(*box) for box in boxes], at=at)
    assert torch.allclose(read_stored(RegionSource(stored=True), at=at).box_R4, as_objects.box_R4, atol=1e-6)


def test_a_batch_of_stored_regions_is_padded_with_zero_shares_where_classes_are_missing():
    source = RegionSource(stored=True)
    found = [read_stored(source), read_stored(source, found_by_a_detector(2, classes=False), confidences=[0.9, 0.8])]
    regions = pad_regions(found)
    assert regions.feature.shape == (2, 5, 3) and regions.classes.shape == (2, 5, 4)
    assert regions.classes[0].eq(0.25).all() and regions.classes[1].eq(0).all() and regions.feature[1, 2:].eq(0).all()
    assert regions.mask.sum(1).tolist() == [5, 2]
    other = found_by_a_detector()._replace(feature_RF=np.zeros((5, 7), np.float16))
    with pytest.raises(UserError, match=r"regions' features of one batch are \[3, 7\] dimensions wide"):
        pad_regions([found[0], read_stored(source, other)])


HOSTILE = io.BytesIO()
np.savez(HOSTILE, norm_bb=np.array([{}], dtype=object), features=np.zeros((1, 2)))


@pytest.mark.parametrize(
    ("info", "stored_with_it", "reason"),
    [
        (
            {"confidences": [CONFIDENCES]},
            (),
            r"no detector's regions are stored with it \(`vlp data import --features`\)",
        ),
        ({}, (b"",), r"field confidences \[\] is not a list of numbers for each image"),
        ({"confidences": [[0.1, 0.2]]}, (b"",), "field confidences: an image's are not falling"),
        ({"confidences": [CONFIDENCES]}, (b"PK",), "its stored regions: not readable as npz"),
        ({"confidences": [CONFIDENCES]}, (HOSTILE.getvalue(),), "its stored regions: Object arrays cannot be loaded"),
        ({"confidences": [[0.5]]}, (pack(found_by_a_detector()),), "5 regions are stored, but not the same number of"),
    ],
)
def test_a_record_with_bad_stored_regions_is_an_error(info, stored_with_it, reason):
    with pytest.raises(RecordError, match=reason):
        read_regions(RegionSource(stored=True), "r", info, WIDE, SQUASH, stored_with_it)


def table(columns: int, value: float = 0.5) -> np.ndarray:
    return np.full((2, columns), value, np.float32)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"features": table(3)}, "norm_bb and features are needed, found features"),
        (
            {"norm_bb": table(4), "features": table(3)[:1]},
            r"tables? of floats with 2 rows, and one is float32 \[1, 3\]",
        ),
        ({"norm_bb": table(4), "features": table(3).astype(int)}, "one is int64"),
        (
            {"norm_bb": np.float32(0.5), "features": table(3)},
            r"each array is a table of floats, and one is float32 \[\]",
        ),
        ({"norm_bb": table(3), "features": table(3)}, "fewer than 4 columns"),
        ({"norm_bb": table(4), "features": table(3, 1e6)}, "a number is not finite"),
        ({"norm_bb": table(4), "features": table(3), "soft_labels": table(2, math.nan)}, "a number is not finite"),
        ({"norm_bb": table(4) * [1, 1, 0.1, 1], "features": table(3)}, "x0 > x1"),
    ],
)
def test_a_detectors_arrays_are_checked(arrays, reason):
    with pytest.raises(ValueError, match=reason):
        check_arrays(arrays)


def test_a_zip_that_would_fill_the_memory_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("norm_bb.npy", bytes(1 << 27))
    with pytest.raises(ValueError, match="holds more than 64 MiB"):
        unpack(file.getvalue())


@pytest.mark.parametrize("cache", [False, True])
def test_stored_regions_travel_from_shards_to_batches(tmp_path, tokenizer, cache):
    with ShardWriter(tmp_path) as writer:
        for i in range(3):
            info = {"captions": ["a cat"], "confidences": [CONFIDENCES[: i + 1]]}
            parts = (pack(found_by_a_detector(i + 1)),) if i < 2 else ()
            writer.write(Record(key=f"p{i}", images=(png(i),), info=info, detected=parts))
    shards = Shards(tmp_path)
    assert [len(record.detected) for record in shards] == [1, 1, 0]
    source = RegionSource(stored=True)
    maker = PairMaker(shards, SQUASH, tokenizer, max_length=9, cache=cache, regions=source)
    for _ in range(2):
        batch, dropped = maker(rows(3))
        assert batch.regions.count.tolist() == [1, 2] and batch.regions.feature.shape == (2, 2, 3)
        assert [d.key for d in dropped] == ["p2"]


def test_a_pair_of_images_keeps_the_regions_of_each(tmp_path):
    found = (found_by_a_detector(2), found_by_a_detector(3))
    info = {"confidences": [[0.9, 0.8], [0.9, 0.8, 0.7]]}
    record = Record(key="p", images=(png(0), png(1)), info=info, detected=tuple(map(pack, found)))
    with ShardWriter(tmp_path) as writer:
        writer.write(record)
    (back,) = Shards(tmp_path)
    assert back.detected == record.detected
    source = RegionSource(stored=True)
    for image in (0, 1):
        found = read_regions(source, "p", back.info, WIDE, SQUASH, back.detected, image=image)
        assert len(found.box_R4) == image + 2


def test_settings_that_contradict_stored_regions_are_refused():
    for bad in ({"whole": True}, {"grid": 2}, {"classes": ("cat",)}, {"empty": "whole"}):
        with pytest.raises(UserError, match=r"`regions\.stored`"):
            RegionSource(stored=True, **bad)
