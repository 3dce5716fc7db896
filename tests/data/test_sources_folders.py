"""Folders in the forms that people have: parquet shards, saved data sets, image and class folders, COCO, Chinese-CLIP."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from fastvlp.data.records.shards import Shards
from fastvlp.data.sources import find_format
from fastvlp.data.sources.importing import Imported, import_data
from fastvlp.errors import UserError


def picture(colour: object = "red", kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(file, kind)
    return file.getvalue()


def put(path: Path, content: object = None) -> Path:
    """Writes a file: a picture, bytes, text, or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = picture() if content is None else content
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def infos(out: Path, split: str = "train") -> dict[str, dict]:
    return {record.key: dict(record.info) for record in Shards(out / split)}


def parquet(path: Path, *captions: str, image: object = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture((len(text) * 9, 0, 0)), "path": None} for text in captions]
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"image": cells, "caption": list(captions)}), path)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"),
        ("train/0000.parquet", "train/0001.parquet", "validation/0000.parquet"),
        ("default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"),
    ],
)
def test_shards_of_parquet_are_one_source(tmp_path: Path, names: tuple[str, ...]) -> None:
    for n, name in enumerate(names):
        parquet(tmp_path / "data" / name, f"number {n}")
    assert find_format(tmp_path / "data").name == "table"
    done = import_data(tmp_path / "data", tmp_path / "out")
    assert done.written == {"train": 2, "val": 1}
    assert [info["captions"] for info in infos(tmp_path / "out").values()] == [["number 0"], ["number 1"]]


def test_a_pattern_of_files_and_one_file_after_another(tmp_path: Path) -> None:
    files = [parquet(tmp_path / f"train-0000{n}-of-00002.parquet", f"number {n}") for n in range(2)]
    assert import_data(tmp_path / "train-*.parquet", tmp_path / "out").written == {"train": 2}
    assert import_data(files[0], tmp_path / "out2").written == {"train": 1}
    with pytest.raises(UserError, match="`append`"):
        import_data(files[1], tmp_path / "out2")
    assert import_data(files[1], tmp_path / "out2", append=True).written == {"train": 1}
    assert [info["captions"] for info in infos(tmp_path / "out2").values()] == [["number 0"], ["number 1"]]
    with pytest.raises(UserError, match="no such file"):
        import_data(tmp_path / "none-*.parquet", tmp_path / "out3")


def test_appending_leaves_out_what_is_there(tmp_path: Path) -> None:
    for n in range(3):
        put(tmp_path / f"{n}.jpg", picture((n, 0, 0)))
    put(tmp_path / "t.csv", "image,caption\n0.jpg,a\n1.jpg,b\n")
    import_data(tmp_path / "t.csv", tmp_path / "out")
    put(tmp_path / "t.csv", "image,caption\n0.jpg,a\n1.jpg,changed\n2.jpg,c\n")
    done = import_data(tmp_path / "t.csv", tmp_path / "out", append=True)
    assert {drop.key: drop.reason for drop in done.dropped} == {"0": "is in the split already"}
    found = {key: info["captions"] for key, info in infos(tmp_path / "out").items()}
    assert found == {"0": ["a"], "1": ["b"], "1_2": ["changed"], "2": ["c"]}
    assert sorted(tar.name for tar in (tmp_path / "out/train").glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert not import_data(tmp_path / "t.csv", tmp_path / "out", append=True).written["test"]


def saved(folder: Path, *captions: str) -> None:
    pa = pytest.importorskip("pyarrow")
    cells = [{"bytes": picture((len(text) * 9, 0, 0)), "path": None} for text in captions]
    table = pa.table({"image": cells, "text": list(captions)})
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    put(folder / "state.json", {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"})
    put(folder / "dataset_info.json", {"features": {}})


def test_saved_data_sets(tmp_path: Path) -> None:
    saved(tmp_path / "one", "a", "bb")
    assert find_format(tmp_path / "one").name == "saved_dataset"
    assert import_data(tmp_path / "one", tmp_path / "out").written == {"train": 2}
    saved(tmp_path / "two/train", "a")
    saved(tmp_path / "two/validation", "bb")
    put(tmp_path / "two/dataset_dict.json", {"splits": ["train", "validation"]})
    assert import_data(tmp_path / "two", tmp_path / "out2").written == {"train": 1, "val": 1}
    assert [info["captions"] for info in infos(tmp_path / "out2").values()] == [["a"]]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_image_folders_with_metadata(tmp_path: Path, name: str) -> None:
    rows = {
        "metadata.csv": "file_name,text\n{0}.jpg,number {0}\n",
        "metadata.jsonl": '{{"file_name": "{0}.jpg", "text": "number {0}"}}',
    }
    for split, n in (("train", 0), ("validation", 1)):
        put(tmp_path / f"root/{split}/{n}.jpg")
        put(tmp_path / f"root/{split}/{name}", rows[name].format(n))
    assert find_format(tmp_path / "root").name == find_format(tmp_path / "root/train").name == "imagefolder"
    assert import_data(tmp_path / "root", tmp_path / "out").written == {"train": 1, "val": 1}
    assert infos(tmp_path / "out", "val")["1"]["captions"] == ["number 1"]
    assert import_data(tmp_path / "root/validation", tmp_path / "out2").written == {"train": 1}


def test_class_folders(tmp_path: Path) -> None:
    for n, name in enumerate(["tabby_cat", "golden_retriever", "golden_retriever/more"]):
        put(tmp_path / f"root/{name}/{n}.jpg")
    put(tmp_path / "root/tabby_cat/Thumbs.db", b"x")
    assert find_format(tmp_path / "root").name == "classes"
    done = import_data(tmp_path / "root", tmp_path / "out")
    assert {key: info["label"] for key, info in infos(tmp_path / "out").items()} == {
        "golden_retriever/1": "golden_retriever",
        "golden_retriever/more/2": "golden_retriever",
        "tabby_cat/0": "tabby_cat",
    }
    assert done.notes == {"files ending in .db are not read": 1}
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cat")):
        put(tmp_path / f"net/{split}/{name}/1.jpg")
    assert import_data(tmp_path / "net", tmp_path / "out2").written == {"train": 2, "val": 1}
    assert infos(tmp_path / "out2", "val")["val/cat/1"]["label"] == "cat"


def test_folders_of_captions_are_no_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"root/{name}/1.jpg")
        put(tmp_path / f"root/{name}/1.txt", "text")
    assert find_format(tmp_path / "root").name == "folder"
    put(tmp_path / "one/images/1.jpg")
    assert find_format(tmp_path / "one").name == "folder"


def coco(name: str = "a.jpg", **more: object) -> dict:
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10]}]
    return {
        "images": [{"id": 1, "file_name": name}],
        "annotations": boxes,
        "categories": [{"id": 1, "name": "dog"}],
        **more,
    }


OBJECT = [{"class": "dog", "box": [1, 2, 11, 12]}]


def test_roboflows_exports(tmp_path: Path) -> None:
    for split, name in (("train", "a.jpg"), ("valid", "b.jpg"), ("test", "c.jpg")):
        put(tmp_path / f"root/{split}/{name}")
        put(tmp_path / f"root/{split}/_annotations.coco.json", coco(name))
    assert import_data(tmp_path / "root", tmp_path / "out").written == {"train": 1, "val": 1, "test": 1}
    assert infos(tmp_path / "out", "val")["valid/b"]["objects"] == OBJECT
    for n, options in enumerate(({}, {"format": "coco"})):
        assert import_data(tmp_path / "root/train", tmp_path / f"one{n}", **options).written == {"train": 1}


@pytest.mark.parametrize("name", ["instances_default.json", "my_labels.json", "annotations/export.json"])
def test_a_single_coco_file(tmp_path: Path, name: str) -> None:
    put(tmp_path / "pics/a.jpg")
    path = put(tmp_path / name, coco(info={"year": 2020}, licenses=[{"id": 1}]))
    assert find_format(path).name == "coco"
    done = import_data(path, tmp_path / "out", images=tmp_path / "pics", split="val")
    assert done.written == {"val": 1}
    (info,) = infos(tmp_path / "out", "val").values()
    assert info["objects"] == OBJECT and "split" not in info


def test_an_image_without_a_file_is_dropped_alone(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2}, "none", {"file_name": "b.jpg"}]
    done = import_data(put(tmp_path / "x.json", coco(images=images)), tmp_path / "out")
    assert done.written == {"train": 1}
    assert {drop.key for drop in done.dropped} == {f"x.json: image {n}".replace("image ", "image:") for n in (2, 3, 4)}


def test_folders_without_texts_are_answered_with_the_format_of_classes(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/2.jpg", "stray.jpg"):
        put(tmp_path / "root" / name)
    with pytest.raises(UserError, match="`format` is classes"):
        import_data(tmp_path / "root", tmp_path / "out")
    done = import_data(tmp_path / "root", tmp_path / "out", format="classes")
    assert done.written == {"train": 2} and [drop.key for drop in done.dropped] == ["stray"]


def test_options_decide_where_a_name_says_nothing(tmp_path: Path) -> None:
    captions = [{"id": n, "image_id": n, "caption": f"number {n}"} for n in range(40)]
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(40)]
    put(tmp_path / "annotations/captions_mine.json", {"images": images, "annotations": captions})
    for n in range(40):
        put(tmp_path / f"images/{n}.jpg", picture((n, 0, 0)))
    put(tmp_path / "mine/0.jpg", picture("blue"))
    done = import_data(tmp_path, tmp_path / "out", val=0.3)
    assert done.written.keys() == {"train", "val"} and done.written.total() == 40
    done = import_data(tmp_path, tmp_path / "out2", images=tmp_path / "images", split="test")
    assert done.written == {"test": 40}
    assert Shards(tmp_path / "out2/test").read(0).images == (picture((0, 0, 0)),)


def test_chinese_clip(tmp_path: Path) -> None:
    lines = [f"{n}\t{base64.b64encode(picture((n, 0, 0))).decode()}" for n in (1, 2, 3)]
    put(tmp_path / "train_imgs.tsv", "\n".join([*lines, "4", "5\tno base64!", ""]))
    texts = [{"text_id": 8, "text": "\u4e00\u53ea\u72d7", "image_ids": [1, 2]}, {"text": "\u732b", "image_ids": [1]}]
    texts += [{"text": "gone", "image_ids": [77]}, {"text": "broken", "image_ids": [5]}]
    put(tmp_path / "train_texts.jsonl", "\n".join(map(json.dumps, texts)) + "\n{nonsense")
    for n, path in enumerate((tmp_path, tmp_path / "train_imgs.tsv", tmp_path / "train_texts.jsonl")):
        assert find_format(path).name == "chinese_clip"
        done: Imported = import_data(path, tmp_path / f"out{n}")
        found = {key: info["captions"] for key, info in infos(tmp_path / f"out{n}").items()}
        assert found == {"1": ["\u4e00\u53ea\u72d7", "\u732b"], "2": ["\u4e00\u53ea\u72d7"]}
        assert {drop.key for drop in done.dropped} == {"3", "77", "5", "train_imgs.tsv:4", "train_texts.jsonl:5"}
        assert all(len(drop.reason) < 200 for drop in done.dropped)
    (tmp_path / "train_texts.jsonl").unlink()
    with pytest.raises(UserError, match=r"train_texts\.jsonl: not here"):
        import_data(tmp_path / "train_imgs.tsv", tmp_path / "out9")
