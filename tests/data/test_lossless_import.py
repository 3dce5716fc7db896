"""Nothing is lost without a word: one bad record never ends an import, and whatever is left out is named or counted."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.tar_index import split_names
from fastvlp.data.sources.importing import Imported, import_data


def picture(colour: object = "red", kind: str = "JPEG", size: tuple[int, int] = (20, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            content = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def infos(out: Path, split: str = "train") -> dict[str, dict]:
    return {record.key: dict(record.info) for record in Shards(out / split)}


def reasons(done: Imported) -> dict[str, str]:
    return {drop.key: drop.reason for drop in done.dropped}


def rows(folder: Path, lines: list[object], images: int = 10) -> Path:
    for n in range(images):
        (folder / f"{n}.jpg").write_bytes(picture((n * 20, 0, 0)))
    path = folder / "t.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


@pytest.mark.parametrize("label", [0, 0.0, False, "0"])
def test_a_label_of_0_is_a_label(tmp_path: Path, label: object) -> None:
    lines = [{"image": "0.jpg", "caption": "", "label": label}, {"image": "1.jpg", "caption": "", "label": 1}]
    done = import_data(rows(tmp_path, lines), tmp_path / "out")
    assert not done.dropped and [info["label"] for info in infos(tmp_path / "out").values()] == [label, 1]
    write_tar(tmp_path / "w.tar", [("0.jpg", picture()), ("0.json", json.dumps({"label": label}))])
    import_data(tmp_path / "w.tar", tmp_path / "tars")
    assert infos(tmp_path / "tars")["0"]["label"] == label


@pytest.mark.parametrize("label", [None, "", []])
def test_an_empty_label_is_none(tmp_path: Path, label: object) -> None:
    lines = [{"image": "0.jpg", "caption": "", "label": label}, {"image": "1.jpg", "caption": "x"}]
    assert reasons(import_data(rows(tmp_path, lines), tmp_path / "out")).keys() == {"0"}


def test_lines_that_are_no_rows_are_dropped_by_number(tmp_path: Path) -> None:
    good = {"image": "0.jpg", "caption": "a"}
    path = rows(tmp_path, [good, "{nonsense", "[1, 2]", '"text"', "", {"image": "1.jpg", "caption": "b"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'\n{"image": "2.jpg", "caption": "\xff"}\n')
    done = import_data(path, tmp_path / "out")
    assert [info["captions"] for info in infos(tmp_path / "out").values()] == [["a"], ["b"]]
    assert reasons(done).keys() == {"t.jsonl:2", "t.jsonl:3", "t.jsonl:4", "t.jsonl:7"}


@pytest.mark.parametrize(
    "field",
    [{"caption": "cut \ud83d"}, {"note": {"a": ["\udc00"]}}, {"caption": "x", "k\ud83d": 1}, {"label": "\ud83d"}],
)
def test_half_a_character_drops_its_record_alone(tmp_path: Path, field: dict) -> None:
    lines = [{"image": "0.jpg", "caption": "x", **field}, {"image": "1.jpg", "caption": "good \U0001f600"}]
    done = import_data(rows(tmp_path, lines), tmp_path / "out")
    assert "surrogate" in reasons(done)["0"]
    assert infos(tmp_path / "out")["1"]["captions"] == ["good \U0001f600"]


def test_half_a_character_in_a_name_is_written_to_the_list_of_dropped(tmp_path: Path) -> None:
    done = import_data(rows(tmp_path, [{"image": "0.jpg", "caption": "x"}, {"image": "\ud83d.jpg"}]), tmp_path / "out")
    assert done.written == {"train": 1}
    (line,) = (tmp_path / "out/dropped.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["file"] == "\ud83d.jpg"


@pytest.mark.parametrize("split", ["../x", "a/b", "/tmp", "..", [1], True, {"a": 1}, "a\nb"])
def test_a_split_that_is_no_folder_drops_its_record_alone(tmp_path: Path, split: object) -> None:
    lines = [{"image": "0.jpg", "caption": "x", "split": split}, {"image": "1.jpg", "caption": "y"}]
    done = import_data(rows(tmp_path, lines), tmp_path / "out")
    assert "split" in reasons(done)["0"] and infos(tmp_path / "out").keys() == {"1"}


def test_usual_names_of_splits_are_one_split_each(tmp_path: Path) -> None:
    names = ["Train", "TRAIN", "restval", " training", "", None, "validation", "Valid", "val", "TEST"]
    lines = [{"image": f"{n}.jpg", "caption": "x", "split": name} for n, name in enumerate(names)]
    done = import_data(rows(tmp_path, lines), tmp_path / "out")
    assert done.written == {"train": 6, "val": 3, "test": 1}
    assert done.notes["records of the split restval go to train"] == 1


def test_a_split_that_no_command_reads_is_named(tmp_path: Path) -> None:
    lines = [{"image": "0.jpg", "caption": "x", "split": "fold_3"}, {"image": "1.jpg", "caption": "x", "split": "dev"}]
    done = import_data(rows(tmp_path, lines), tmp_path / "out")
    assert done.written == {"fold_3": 1, "dev": 1}
    (note,) = done.notes
    assert "fold_3" in note


def test_dropped_records_have_the_whole_names_of_their_files(tmp_path: Path) -> None:
    path = rows(tmp_path, [{"image": name, "caption": "x"} for name in ("0.jpg", "a.png", "a.webp", "none.ico")])
    for name in ("a.png", "a.webp"):
        (tmp_path / name).write_bytes(b"no image")
    import_data(path, tmp_path / "out")
    lines = map(json.loads, (tmp_path / "out/dropped.jsonl").read_text().splitlines())
    assert [line["file"] for line in lines] == ["a.png", "a.webp", "none.ico"]


MEMBERS = [
    ("a/22.05.jpg", picture("red")),
    ("a/22.05.txt", "one"),
    ("a/22.06.jpg", picture("blue")),
    ("a/22.06.txt", "two"),
    ("s.left.jpg", picture("red")),
    ("s.right.jpg", picture("blue")),
    ("s.json", '{"caption": "stereo"}'),
    ("list.jpg", picture()),
    ("list.json", '{"caption": ["one dog", "a dog"]}'),
    ("null.jpg", picture()),
    ("null.json", '{"caption": null, "url": "x"}'),
    ("upper.JPEG", picture()),
    ("upper.TXT", "upper"),
    ("bom.jpg", picture()),
    ("bom.txt", b"\xef\xbb\xbfwith bom"),
    ("cls.jpg", picture()),
    ("cls.cls", "7"),
    ("string.jpg", picture()),
    ("string.json", '{"captions": "one string"}'),
    ("text.jpg", picture()),
    ("text.text", "other ending"),
    ("img.img", picture()),
    ("img.cap", "img cap"),
    ("empty.jpg", picture()),
    ("empty.txt", ""),
    ("empty.json", '{"caption": "json has it"}'),
    ("array.jpg", picture()),
    ("array.json", '[{"caption": "a list"}, "of two"]'),
    ("nest/ed/dir.1/x.jpg", picture()),
    ("nest/ed/dir.1/x.txt", "dotted folder"),
    ("./r.jpg", picture()),
    ("./r.txt", "dot slash"),
    ("v.avif", b"x"),
    ("v.txt", "avif"),
    ("seg.jpg", picture()),
    ("seg.seg.png", picture("green", "PNG")),
    ("seg.emb.npy", b"123"),
    ("seg.txt", "segments"),
]


def test_members_of_a_tar_in_every_usual_form(tmp_path: Path) -> None:
    done = import_data(write_tar(tmp_path / "w.tar", MEMBERS), tmp_path / "out")
    found = infos(tmp_path / "out")
    captions = {key: info.get("captions") for key, info in found.items()}
    assert captions == {
        "a/22_05": ["one"],
        "a/22_06": ["two"],
        "s": ["stereo"],
        "list": ["one dog", "a dog"],
        "upper": ["upper"],
        "bom": ["with bom"],
        "cls": None,
        "string": ["one string"],
        "text": ["other ending"],
        "img": ["img cap"],
        "empty": ["json has it"],
        "array": ["a list", "of two"],
        "nest/ed/dir_1/x": ["dotted folder"],
        "r": ["dot slash"],
        "seg": ["segments"],
    }
    assert found["cls"]["label"] == 7
    images = {record.key: record.images for record in Shards(tmp_path / "out/train")}
    assert images["s"] == (picture("red"), picture("blue")) and images["a/22_06"] == (picture("blue"),)
    assert reasons(done).keys() == {"null", "v"}
    assert done.notes == {"members ending in .seg.png are not read": 1, "members ending in .emb.npy are not read": 1}


def test_a_tar_with_dotted_names_is_trained_on_as_it_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "w/0.tar", MEMBERS)
    shards = Shards(tmp_path / "w")
    found = {shards.key(i): shards.info(i) for i in range(len(shards)) if shards.key(i) not in ("array",)}
    assert found["a/22.05"]["captions"] == ["one"] and found["a/22.06"]["captions"] == ["two"]
    assert found["list"]["captions"] == ["one dog", "a dog"] and found["empty"]["captions"] == ["json has it"]
    assert usable_captions(found["string"], "captions") == ["one string"]


def test_members_of_one_key() -> None:
    names = [
        "7.jpg",
        "7.1.jpg",
        "7.10.jpg",
        "7.json",
        "7.npz",
        "7.1.npz",
        "x/2.0.jpg",
        "x/2.1.jpg",
        "8.flac",
        "8.seg.flac",
    ]
    assert [key for key, _ in split_names(names)] == ["7"] * 6 + ["x/2"] * 2 + ["8"] * 2
    assert [suffix for _, suffix in split_names(names)][:4] == ["jpg", "1.jpg", "10.jpg", "json"]


def test_members_apart_are_one_record_and_said_to_be_apart(tmp_path: Path) -> None:
    images = [(f"{n}.jpg", picture((n, 0, 0))) for n in range(3)]
    texts = [(f"{n}.txt", f"number {n}") for n in range(3)]
    done = import_data(write_tar(tmp_path / "w.tar", images + texts), tmp_path / "out")
    assert [info["captions"] for info in infos(tmp_path / "out").values()] == [["number 0"], ["number 1"], ["number 2"]]
    assert any("sort them by name" in note for note in done.notes)
    # Names that come again are other records.
    twice = [*images[:1], *texts[:1], *images[1:2], *texts[1:2], *images[:1], ("0.txt", "again")]
    import_data(write_tar(tmp_path / "x.tar", twice), tmp_path / "out2")
    assert {key: info["captions"] for key, info in infos(tmp_path / "out2").items()} == {
        "0": ["number 0"],
        "1": ["number 1"],
        "0_2": ["again"],
    }


@pytest.mark.parametrize("name", ["classnames.txt", "classes.txt"])
def test_numbers_of_classes_have_names_beside_the_tars(tmp_path: Path, name: str) -> None:
    members = [(f"s{n}.{suffix}", data) for n in range(3) for suffix, data in (("webp", picture()), ("cls", str(n)))]
    write_tar(tmp_path / "root/0.tar", members)
    (tmp_path / "root" / name).write_text("\ufeffgolden retriever\ntabby cat\n", "utf-8")
    import_data(tmp_path / "root", tmp_path / "out")
    assert [info["label"] for info in infos(tmp_path / "out").values()] == ["golden retriever", "tabby cat", 2]


def test_tars_in_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_tar(tmp_path / f"root/{split}/0.tar", [("0.jpg", picture()), ("0.txt", split)])
    assert import_data(tmp_path / "root", tmp_path / "out").written == {"train": 1, "test": 1}


def test_links_are_followed_and_loops_noticed(tmp_path: Path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    for folder, names in ((root, "c"), (store, "ab")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jpg").write_bytes(picture())
            (folder / f"{name}.txt").write_text(name)
    (root / "one.jpg").symlink_to("../store/b.jpg")
    (root / "one.txt").write_text("a linked picture")
    (root / "linked").symlink_to("../store")
    (root / "loop").symlink_to(".")
    done = import_data(root, tmp_path / "out")
    assert infos(tmp_path / "out").keys() == {"c", "one", "linked/a", "linked/b"} and not done.dropped
    assert any("lead back" in note for note in done.notes)
    # As in the cache of a hub: a file that is a link to a blob outside.
    (tmp_path / "t").mkdir()
    (tmp_path / "t/x.jpg").symlink_to("../store/a.jpg")
    (tmp_path / "t/p.csv").write_text("image,caption\nx.jpg,linked\n")
    for n, options in enumerate(({}, {"images": tmp_path / "t"})):
        import_data(tmp_path / "t/p.csv", tmp_path / f"out{n}", **options)
        assert infos(tmp_path / f"out{n}")["x"]["captions"] == ["linked"]


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a.jpg", "b.JPG", "c.jfif"):
        (root / name).write_bytes(picture())
    (root / "a.txt").write_text("one\n\ntwo")
    (root / "b.TXT").write_text("upper")
    (root / "c.json").write_text('{"caption": ["three"], "author": "me"}')
    (root / "d.txt").write_text("no image")
    (root / "e.psd").write_bytes(b"x")
    (root / "f.psd").write_bytes(b"x")
    done = import_data(root, tmp_path / "out", format="folder")
    assert [info["captions"] for info in infos(tmp_path / "out").values()] == [["one", "two"], ["upper"], ["three"]]
    assert infos(tmp_path / "out")["c"]["author"] == "me"
    assert done.notes == {"files ending in .psd are not read": 2, ".txt files without an image": 1}


def test_the_ways_a_table_writes_a_path(tmp_path: Path) -> None:
    img = tmp_path / "img"
    img.mkdir()
    for name in ("1.jpg", "2.jpg", "caf\u0065\u0301.jpg", "my dog.jpg", "UP.JPG"):
        (img / name).write_bytes(picture())
    names = ["img\\1.jpg", "./img/2.jpg", "img/caf\u00e9.jpg", "img/my%20dog.jpg", "img/up.jpg", str(img / "2.jpg")]
    bad = ["/somewhere/img/3.jpg", "https://example.org/x.jpg", "img/none.jpg"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"image": name, "caption": name}) for name in names + bad))
    done = import_data(path, tmp_path / "out")
    assert done.written == {"train": len(names)}
    found = {drop.file: drop.reason for drop in done.dropped}
    assert "URL" in found[bad[1]] and "img2dataset" in found[bad[1]]
    assert "leaves" in found[bad[0]] and "missing" in found[bad[2]]


def test_an_annotation_without_a_box_is_dropped_by_its_id(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2, 3)]
    boxes = [[1, 2, 10, 10], [], [1, 2, 3, 4], None, [1, "x", 2, 2], [0, 0, -3, 2]]
    at = [1, 2, 3, 3, 3, 3]
    annotations = [{"id": n, "image_id": at[n], "category_id": 1, "bbox": box} for n, box in enumerate(boxes)]
    annotations += [
        {"id": 6, "image_id": 3, "bbox": [0, 0, 1, 1]},
        "no annotation",
        {"id": 7, "image_id": 9, "bbox": []},
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content))
    (tmp_path / "train2017").mkdir()
    for n in (1, 2, 3):
        (tmp_path / f"train2017/{n}.jpg").write_bytes(picture())
    done = import_data(tmp_path, tmp_path / "out")
    assert infos(tmp_path / "out")["train2017/1"]["objects"] == [{"class": "dog", "box": [1, 2, 11, 12]}]
    assert infos(tmp_path / "out")["train2017/3"]["objects"] == [{"class": "dog", "box": [1, 2, 4, 6]}]
    found = reasons(done)
    assert "annotation 1: " in found["train2017/2"] and "[]" in found["train2017/2"]
    assert {f"train2017/3: annotation {n}" for n in (3, 4, 5, 6)} < found.keys() and len(found) == 7
