import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources import find_format
from fastvlp.data.sources.examples import ExamplesSource
from fastvlp.data.sources.folder import FolderSource
from fastvlp.data.sources.nlvr import NLVRSource
from fastvlp.data.sources.table import TableSource
from fastvlp.data.sources.webdataset import WebDatasetSource
from fastvlp.errors import UserError


def picture(colour: str = "red", size: tuple[int, int] = (20, 12), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def parted(items) -> tuple[dict[str, Record], dict[str, str]]:
    items = list(items)
    records = {item.key: item for item in items if isinstance(item, Record)}
    return records, {item.key: item.reason for item in items if isinstance(item, Dropped)}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/a.png").write_bytes(picture("red"))
    (tmp_path / "pics/b.png").write_bytes(picture("blue"))
    return tmp_path


ROWS = [("pics/a.png", "a red card"), ("pics/b.png", "蓝色，\n两行"), ("pics/a.png", "red, wholly")]


def write_table(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("image", "caption")) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(header, row))) for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({name: list(column) for name, column in zip(header, zip(*rows))}), path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_one_image_are_one_record(pairs: Path, suffix: str) -> None:
    path = write_table(pairs / f"t.{suffix}", ROWS)
    assert find_format(path).name == "table"
    records, dropped = parted(TableSource().read(path))
    assert not dropped and list(records) == ["pics/a", "pics/b"]
    assert records["pics/a"].info["captions"] == ["a red card", "red, wholly"]
    assert records["pics/b"].info["captions"] == ["蓝色，\n两行"]
    assert records["pics/b"].images == (picture("blue"),)
    assert TableSource().count(path) == 2


def test_a_table_keeps_other_columns_and_takes_column_names(pairs: Path) -> None:
    path = pairs / "t.csv"
    path.write_text("pic,says,split\na.png,one,val\n,two,val\n", encoding="utf-8")
    source = TableSource(image_column="pic", caption_column="says", images=pairs / "pics")
    records, dropped = parted(source.read(path))
    assert records["a"].info == {"captions": ["one"], "split": "val"}
    assert dropped == {"t.csv:3": "row names no image"}


def test_chinese_stands_beside_english(pairs: Path) -> None:
    header = "image,caption,caption_zh\n"
    rows = "pics/a.png,a red card,红卡\npics/b.png,blue,\npics/a.png,red,\npics/a.png,red again,一张红卡\n"
    (pairs / "t.csv").write_text(header + rows, encoding="utf-8")
    records, dropped = parted(TableSource().read(pairs / "t.csv"))
    assert not dropped and records["pics/a"].info["captions_zh"] == ["红卡", "一张红卡"]
    assert records["pics/a"].info["captions"] == ["a red card", "red", "red again"]
    assert records["pics/b"].info == {"captions": ["blue"]}
    lines = [{"image": "pics/a.png", "caption": "x", "captions_zh": ["一", "二"]}, {"image": "pics/a.png"}]
    (pairs / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (record,) = TableSource().read(pairs / "t.jsonl")
    assert isinstance(record, Record) and record.info == {"captions": ["x"], "captions_zh": ["一", "二"]}
    # English columns are often named after the language, too.
    (pairs / "t.csv").write_text("image,caption_en,caption_zh\npics/a.png,a card,红卡\n", encoding="utf-8")
    (record,) = TableSource().read(pairs / "t.csv")
    assert isinstance(record, Record) and record.info == {"captions": ["a card"], "captions_zh": ["红卡"]}
    # As the caption column itself it is the captions.
    (pairs / "t.csv").write_text("image,caption_zh\npics/a.png,红卡\n", encoding="utf-8")
    (record,) = TableSource(caption_column="caption_zh").read(pairs / "t.csv")
    assert isinstance(record, Record) and record.info == {"captions": ["红卡"]}


def test_parquet_may_hold_the_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = [{"bytes": picture(), "path": "x.png"}]
    parquet.write_table(pa.table({"image": column, "text": ["hello"]}), tmp_path / "t.parquet")
    (record,) = TableSource().read(tmp_path / "t.parquet")
    assert isinstance(record, Record) and record.images == (picture(),) and record.info["captions"] == ["hello"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "pics/../../secret.png"])
def test_a_path_that_leaves_the_folder_is_refused(pairs: Path, name: str) -> None:
    inner = pairs / "inner"
    (inner / "pics").mkdir(parents=True)
    (pairs / "secret.png").write_bytes(picture())
    (dropped,) = TableSource().read(write_table(inner / "t.csv", [(name, "x")]))
    assert isinstance(dropped, Dropped) and "`images`" in dropped.reason


def test_what_a_table_gets_wrong_is_named(pairs: Path) -> None:
    records, dropped = parted(
        TableSource().read(write_table(pairs / "t.csv", [("pics/none.png", "x"), ("pics/a.png", "y")]))
    )
    assert list(records) == ["pics/a"] and dropped == {"pics/none": f"image file is missing in {pairs}"}
    with pytest.raises(UserError, match=r"t\.csv.*no caption column.*picture, words.*`caption_column`"):
        list(TableSource().read(write_table(pairs / "t.csv", ROWS, ("image", "picture, words"))))
    (pairs / "t.csv").write_bytes("image,caption\npics/a.png,é\n".encode("latin-1"))
    _, dropped = parted(TableSource().read(pairs / "t.csv"))
    assert "not UTF-8" in dropped["t.csv:2"] and "iconv" in dropped["t.csv:2"]
    (pairs / "t.jsonl").write_text('{"image": "a.png"}\n{nonsense\n')
    with pytest.raises(UserError, match=r"t\.jsonl.*no caption column"):
        list(TableSource().read(pairs / "t.jsonl"))
    (pairs / "t.jsonl").write_text('{"image": "a.png", "caption": "x"}\n{nonsense\n')
    _, dropped = parted(TableSource().read(pairs / "t.jsonl"))
    assert dropped["t.jsonl:2"].startswith("line is not JSON")
    (pairs / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"t\.parquet: "):
        list(TableSource().read(pairs / "t.parquet"))


def test_long_captions_pass(pairs: Path) -> None:
    (record,) = TableSource().read(write_table(pairs / "t.csv", [("pics/a.png", "word " * 40_000)]))
    assert isinstance(record, Record) and len(record.info["captions"][0]) == 200_000


def test_folder(pairs: Path) -> None:
    (pairs / "pics/a.txt").write_text("one\n二\n", encoding="utf-8")
    (pairs / "c.png").write_bytes(picture())
    (pairs / "c.txt").write_bytes(b"\xff\xfe\x00")
    assert find_format(pairs).name == "folder"
    records, dropped = parted(FolderSource().read(pairs))
    assert records["pics/a"].info == {"captions": ["one", "二"]}
    assert dropped == {"c": "its .txt is not UTF-8", "pics/b": "no .txt beside the image"}
    assert FolderSource().count(pairs) == 3


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


MEMBERS = {
    "0001.jpg": picture(kind="JPEG"),
    "0001.txt": b"a cat",
    "d/0002.json": json.dumps({"caption": "two", "score": 1}).encode(),
    "d/0002.png": picture(),
    "d/0002.1.png": picture("blue"),
    "d/0002.seg.png": picture("green"),
    "0003.txt": b"no image",
    "0004.png": picture(),
    "0004.json": b"{",
    "0005.png": picture(),
    "0005.txt": b"\xff\xff",
}


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_webdataset(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / name, MEMBERS)
    assert find_format(tmp_path).name == "webdataset" == find_format(tmp_path / name).name
    records, dropped = parted(WebDatasetSource().read(tmp_path))
    assert records["0001"].info == {"captions": ["a cat"]}
    assert records["d/0002"].info == {"captions": ["two"], "score": 1}
    assert records["d/0002"].images == (picture(), picture("blue"))
    assert set(records) == {"0001", "d/0002"}
    assert dropped["0003"].startswith("no image") and "not JSON" in dropped["0004"] and "UTF-8" in dropped["0005"]


def test_a_cut_tar_gives_what_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{i}.{e}": b"x" * 600 for i in range(4) for e in ("jpg", "txt")})
    path.write_bytes(path.read_bytes()[: 6 * 1536 - 700])
    records, dropped = parted(WebDatasetSource().read(path))
    assert set(records) == {"0", "1"}
    assert list(dropped) == ["x.tar: after 2"] and "cut or damaged" in dropped["x.tar: after 2"]
    path.write_bytes(b"this is no tar at all")
    assert list(parted(WebDatasetSource().read(path))[1]) == ["x.tar: after its start"]


BOXES = [
    [{"x_loc": 10, "y_loc": 20, "type": "square", "color": "Yellow", "size": 30}],
    [{"x_loc": 0, "y_loc": 0, "type": "circle", "color": "#0099ff", "size": 10}],
    [],
]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    images = tmp_path / "dev/images/3"
    images.mkdir(parents=True)
    rows = [
        {"identifier": "5-1", "sentence": "x", "label": "false", "directory": "3", "structured_rep": BOXES},
        {"identifier": "6-0", "label": "true", "directory": "3"},
    ]
    (tmp_path / "dev/dev.json").write_text("\n".join(map(json.dumps, rows)))
    for k in range(5):
        (images / f"dev-5-1-{k}.png").write_bytes(picture(size=(40 + k, 10)))
    return tmp_path


def test_nlvr_in_its_official_layout(official: Path) -> None:
    assert find_format(official).name == "nlvr"
    records, dropped = parted(NLVRSource().read(official))
    assert list(records) == [f"dev-5-1-{k}" for k in range(5)]
    assert dropped == {
        "dev-5-1-5": f"image file is missing in {official}/dev",
        "dev-6-0": "no sentence or no label",
    }
    info = records["dev-5-1-3"].info
    assert info["statements"] == [{"text": "x", "label": False}]
    assert (info["split"], info["group"], info["permutation"]) == ("dev", "dev-5", 3)
    # Image 3 has the boxes in the order (1, 2, 0).
    assert info["objects"] == [
        {"class": "blue circle", "box": [0, 0, 10, 10]},
        {"class": "yellow square", "box": [310, 20, 340, 50]},
    ]


def write_examples(path: Path, rows: list[dict], members: dict[str, bytes]) -> Path:
    (path / "examples.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with zipfile.ZipFile(path / "images.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_examples(tmp_path: Path) -> None:
    rows = [
        {
            "image": "p/1",
            "file": "1.png",
            "width": 20,
            "captions": ["a"],
            "captions_zh": ["一"],
            "label": "card",
            "boxes": [{"label": "cat", "bbox_xywh": [1, 2, 3, 4], "crowd": 0}],
            "qa": [{"q": "What is it?", "a": "red"}, {"q": "Who?", "choices": ["x", "y"], "answer": 1}],
            "split": "val",
        },
        {"image": "s", "file": "1.png", "captions": ["is red green"], "label": False, "program": "(is red green)"},
        {"image": "t", "file": "1.png", "captions": ["it is red"], "label": True},
        {"image": "none", "file": "../1.png", "captions": ["x"]},
        {"image": "bad", "file": "1.png", "qa": [{"a": "no question"}]},
        {"image": "train-7-0", "file": [f"{k}.png" for k in range(6)], "captions": ["n"], "label": True}
        | {"label_source": "gold", "objects": BOXES, "split": "train"},
        {"image": "train-8-0", "file": ["0.png"], "captions": [], "label": None},
    ]
    write_examples(tmp_path, rows, {f"{k}.png": picture(size=(k + 1, 1)) for k in range(6)})
    assert find_format(tmp_path).name == "examples"
    records, dropped = parted(ExamplesSource().read(tmp_path))
    info = records["p/1"].info
    assert info["captions"] == ["a"] and info["captions_zh"] == ["一"] and info["label"] == "card"
    assert info["objects"] == [{"class": "cat", "box": [1, 2, 4, 6], "crowd": 0}] and "width" not in info
    assert info["questions"] == [
        {"question": "What is it?", "kind": "what", "answers": {"red": 1.0}},
        {"question": "Who?", "kind": "who", "answers": {"y": 1.0}, "answer": "y", "choices": ["y", "x"]},
    ]
    assert info["choices"] == [{"question": "Who?", "answers": ["x", "y"], "right": 1}]
    assert records["s"].info["questions"] == [{"question": "is red green", "answers": {"no": 1.0}}]
    assert records["t"].info["statements"] == [{"text": "it is red", "label": True}]
    assert "captions" not in records["t"].info and "label" not in records["t"].info
    assert records["train-7-0-4"].images == (picture(size=(5, 1)),)
    assert records["train-7-0-4"].info["label_source"] == "gold" and records["train-7-0-4"].info["group"] == "train-7"
    assert dropped["none"] == "image is not in images.zip" and dropped["train-8-0"] == "no sentence or no label"
    assert "KeyError" in dropped["bad"]
    assert ExamplesSource().count(tmp_path) == len(records) + len(dropped)


def test_a_broken_zip_is_named(tmp_path: Path) -> None:
    write_examples(tmp_path, [], {})
    (tmp_path / "images.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"images\.zip: "):
        list(ExamplesSource().read(tmp_path))


def test_a_path_without_a_format_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)`format`.*examples.*folder.*nlvr.*table.*`image_column`.*webdataset"):
        find_format(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        find_format(tmp_path / "nothing")
    (tmp_path / "a.png").write_bytes(picture())
    write_table(tmp_path / "t.csv", ROWS)
    with pytest.raises(UserError, match=r"t\.csv"):
        find_format(tmp_path)
    assert find_format(tmp_path, "folder") is FolderSource
    with pytest.raises(UserError, match=r"`format` tabel: .*table"):
        find_format(tmp_path, "tabel")


def test_a_folder_of_two_formats_is_not_guessed(tmp_path: Path) -> None:
    write_examples(tmp_path, [], {})
    (tmp_path / "dataset_coco.json").write_text("{}")
    with pytest.raises(UserError, match=r"examples.*karpathy.*`format`"):
        find_format(tmp_path)
    assert find_format(tmp_path, "karpathy").name == "karpathy"
