import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlp.batch import Record
from fastvlp.data.records.decode import read_pixels
from fastvlp.data.records.shards import Shards
from fastvlp.data.sources.importing import Imported, _prepare, import_data, shrink
from fastvlp.errors import UserError


def picture(size: tuple[int, int] = (20, 12), kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 30,000 x 30,000 pixels."""
    data = picture()
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def source(folder: Path, rows: list[dict], images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (folder / name).write_bytes(data)
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder / "t.jsonl"


def run(folder: Path, rows: list[dict], images: dict[str, bytes], **options: object) -> Imported:
    return import_data(source(folder, rows, images), folder / "out", **options)


def row(name: str, *captions: str, **info: object) -> dict:
    return {"image": name, "caption": list(captions), **info}


def test_splits_counts_and_drops(tmp_path: Path) -> None:
    rows = [
        row("a.v1.png", " a cat ", "", "a cat indoors"),
        row("b.png", "a dog", split="val"),
        row("cut.jpg", "cut"),
        row("text.png", "no image"),
        row("none.png", "missing"),
        row("c.png", ""),
        row("bomb.png", "30000 x 30000"),
        row("d.png", "d", statements=[{"text": "no label"}]),
    ]
    images = {name: picture() for name in ("a.v1.png", "b.png", "c.png", "d.png")}
    images |= {"cut.jpg": picture((300, 300), "JPEG")[:8000], "text.png": b"hello", "bomb.png": bomb()}
    done = run(tmp_path, rows, images)
    assert done.written == {"train": 1, "val": 1}
    (record,) = Shards(tmp_path / "out/train")
    # A dot ends a key in a tar, so none is left in it.
    assert record.key == "a_v1" and record.images == (picture(),)
    assert record.info["captions"] == ["a cat", "a cat indoors"]
    written = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in written}
    assert set(reasons) == {"cut", "text", "none", "c", "d", "bomb"}
    assert "truncated" in reasons["cut"] and reasons["text"].startswith("not an image of a known format")
    assert "pixels" in reasons["bomb"]
    assert reasons["none"] == f"image file is missing in {tmp_path}" and reasons["c"].startswith("no caption")
    assert reasons["d"] == "field statements is not a list of objects with text and label"
    assert done.reasons.total() == 6


def test_larger_images_are_made_smaller_with_their_boxes(tmp_path: Path) -> None:
    rows = [row("big.png", "x", objects=[{"class": "c", "box": [40, 20, 80, 40]}]), row("small.png", "y")]
    run(tmp_path, rows, {"big.png": picture((80, 40)), "small.png": picture((20, 20))}, max_side=20)
    big, small = Shards(tmp_path / "out/train")
    image = Image.open(io.BytesIO(big.images[0]))
    assert image.size == (20, 10) and image.format == "JPEG"
    assert big.info["objects"] == [{"class": "c", "box": [10, 5, 20, 10]}]
    assert small.images == (picture((20, 20)),)


def test_boxes_of_a_pair_follow_their_own_image() -> None:
    objects = [{"class": "c", "box": [0, 0, 20, 20], "image": at} for at in (0, 1, "left.png")]
    pair = Record(key="p", images=(picture((80, 40)), picture((40, 40))), info={"objects": objects})
    made = _prepare(pair, max_side=20)
    assert [o["box"][2] for o in made.info["objects"]] == [5, 10, 5]


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {}),
        ("WEBP", "RGBA", {}),
    ],
)
def test_every_kind_of_image_can_be_made_smaller(kind: str, mode: str, options: dict) -> None:
    data, scale = shrink(picture((64, 32), kind, mode, **options), 16)
    assert Image.open(io.BytesIO(data)).size == (16, 8) and scale == 0.25


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("way", range(1, 9))
def test_boxes_of_a_turned_image_stay_where_they_were(way: int, kind: str) -> None:
    """Boxes are in the stored pixels, before EXIF turns them."""
    exif = Image.Exif()
    exif[0x0112] = way
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[0:16, 48:64] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=exif)
    info = {"objects": [{"class": "white", "box": [48, 0, 64, 16]}]}
    made = _prepare(Record(key="t", images=(file.getvalue(),), info=info), max_side=16)
    image = Image.open(io.BytesIO(made.images[0]))
    assert image.size == (16, 8) and image.getexif().get(0x0112, 1) == way
    assert made.info["objects"][0]["box"] == [12, 0, 16, 4]
    grey = np.asarray(image.convert("L"))
    assert grey[0:3, 13:16].mean() > 230 and grey[5:, :11].mean() < 25
    # It is seen as the large one is.
    large, small = (read_pixels(data) for data in (file.getvalue(), made.images[0]))
    assert [side // 4 for side in large.shape[:2]] == list(small.shape[:2])
    assert (large[2::4, 2::4].float() - small.float()).abs().mean() < 20


def test_held_out_shares_are_steady_and_keep_groups_together(tmp_path: Path) -> None:
    rows = [row(f"{i}.png", "x", group=f"g{i // 4}") for i in range(200)]
    images = {f"{i}.png": picture((2, 2)) for i in range(200)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = run(tmp_path / "one", rows, images, val=0.2, test=0.2)
    run(tmp_path / "two", rows[:100], images, val=0.2, test=0.2)
    assert set(one.written) == {"train", "val", "test"} and one.written["train"] > 80
    splits = {}
    for folder in ("one", "two"):
        for split in ("train", "val", "test"):
            for record in Shards(tmp_path / folder / "out" / split):
                splits.setdefault(record.info["group"], set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


def test_equal_keys_are_made_different(tmp_path: Path) -> None:
    run(tmp_path, [row("a.b.png", "x"), row("a_b.png", "y")], {n: picture() for n in ("a.b.png", "a_b.png")})
    assert Shards(tmp_path / "out/train").keys == ["a_b", "a_b_2"]


def test_an_import_that_cannot_work_is_refused(tmp_path: Path) -> None:
    message = rf"no usable record among 2 \(first: in/none\): 2x image file is missing in {tmp_path}; .*`images`$"
    with pytest.raises(UserError, match=message):
        run(tmp_path, [row("in/none.png", "x"), row("in/b.png", "x")], {})
    with pytest.raises(UserError, match=f"`images` {tmp_path}/nowhere: no such folder"):
        import_data(source(tmp_path, [row("a.png", "x")], {}), tmp_path / "out", images=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"split '\.\./up' cannot be a folder's name"):
        run(tmp_path, [row("a.png", "x", split="../up")], {"a.png": picture()})
    assert not list(tmp_path.glob("**/*.tar"))
    run(tmp_path, [row("a.png", "x")], {"a.png": picture()})
    with pytest.raises(UserError, match="out/train: "):
        run(tmp_path, [row("a.png", "x")], {"a.png": picture()})
    for wrong, named in (({"val": 0.5, "test": 0.5}, "`val` 0.5 and `test` 0.5"), ({"max_side": -1}, "`max_side`")):
        with pytest.raises(UserError, match=named):
            run(tmp_path, [row("a.png", "x")], {"a.png": picture()}, **wrong)


def test_images_in_another_folder_are_found_by_the_option_that_a_note_names(tmp_path: Path) -> None:
    rows = [row("a.png", "x"), row("b.png", "y"), row("c.png", "z")]
    some = run(tmp_path, rows, {"a.png": picture()})
    assert some.written == {"train": 1}
    (note,) = (text for text in some.notes if "`images`" in text)
    assert some.notes[note] == 2 and some.examples[note] == "b.png"
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "elsewhere" / name).write_bytes(picture())
    moved = import_data(source(tmp_path, rows, {}), tmp_path / "moved", images=tmp_path / "elsewhere")
    assert moved.written == {"train": 3} and not moved.notes
    # A folder of pictures has none elsewhere.
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture())
    with pytest.raises(UserError) as caught:
        import_data(tmp_path / "pictures", tmp_path / "out2", progress=False)
    assert "`images`" not in str(caught.value)


def test_an_option_of_another_format_is_refused_with_the_formats_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="`image_column` is no option of the format folder; it has none"):
        import_data(tmp_path, tmp_path / "out", image_column="image")
    with pytest.raises(
        UserError, match=r"`columns` .* of the format table; it has `images`, `image_column`, `caption_column`"
    ):
        run(tmp_path, [row("a.png", "x")], {}, columns="image")


def test_boxes_and_scores_that_are_no_numbers_are_dropped_by_name(tmp_path: Path) -> None:
    rows = [
        row("a.png", "x", objects=[{"class": "c", "box": [0, 0, 4, 4]}]),
        row("b.png", "x", objects=[{"class": "c", "box": [0, 0, None, 4]}]),
        row("c.png", "x", questions=[{"question": "q", "answers": {"yes": "often"}}]),
    ]
    done = run(tmp_path, rows, {name: picture() for name in ("a.png", "b.png", "c.png")}, max_side=10)
    assert done.written == {"train": 1}
    reasons = {drop.key: drop.reason for drop in done.dropped}
    assert "field objects: box [0, 0, None, 4]" in reasons["b"]
    assert "field questions: score 'often' of answer 'yes'" in reasons["c"]


def test_splits_are_imported_one_by_one(tmp_path: Path) -> None:
    """Tables of a split each go into one folder; what one of them dropped stays on record."""
    images = {"a.png": picture(), "b.png": picture()}
    run(tmp_path, [row("a.png", "x"), row("none.png", "y")], images)
    done = run(tmp_path, [row("b.png", "z"), row("gone.png", "y")], images, split="val")
    assert done.written == {"val": 1} and len(done.dropped) == 1
    assert [Shards(tmp_path / "out" / split).keys for split in ("train", "val")] == [["a"], ["b"]]
    lines = (tmp_path / "out/dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["none", "gone"]
    # A split that is there stops the whole import, also where another split comes first.
    with pytest.raises(UserError, match="out/val: already holds shards"):
        run(tmp_path, [row("a.png", "x", split="test"), row("b.png", "z", split="val")], images)
    assert not list(tmp_path.glob("out/test/*")) and len(Shards(tmp_path / "out/train")) == 1
    assert (tmp_path / "out/dropped.jsonl").read_text().splitlines() == lines


def test_a_failure_leaves_no_shards(tmp_path: Path) -> None:
    path = source(tmp_path, [row("a.png", "x")], {"a.png": picture()})
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="already holds shards"):
        import_data(path, tmp_path / "out")
    (tmp_path / "out/train/00000.tar").unlink()
    assert not list(tmp_path.glob("**/*.tar*"))
