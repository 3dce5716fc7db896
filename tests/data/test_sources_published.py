"""Published annotations, made small in the forms in which they are published."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.cli import main
from fastvlp.data.records.schema import fault
from fastvlp.data.sources import find_format, formats, formats_help, make_source
from fastvlp.data.sources.interface import AnnotationSource
from fastvlp.errors import UserError


def picture(path: Path, colour: str = "red") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    path.write_bytes(file.getvalue())
    return file.getvalue()


def write(path: Path, content: Any, *, lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def read(path: Path, format: str, **options: Any) -> tuple[dict[str, Record], dict[str, str]]:
    items = list(make_source(formats()[format], options).read(path))
    records = {item.key: item for item in items if isinstance(item, Record)}
    assert not any(map(fault, (record.info for record in records.values())))
    return records, {item.key: item.reason for item in items if isinstance(item, Dropped)}


COCO_IMAGES = [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}]
CATEGORIES = [{"id": 51, "name": "bowl"}, {"id": 1, "name": "person"}]
BOX = {"id": 7, "image_id": 9, "category_id": 51, "bbox": [1.5, 2, 3, 4], "iscrowd": 0}


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    captions = [{"image_id": 9, "id": 1, "caption": "A bowl."}, {"image_id": 9, "id": 2, "caption": "Food"}]
    write(tmp_path / "annotations/captions_train2017.json", {"images": COCO_IMAGES, "annotations": captions})
    boxes = [BOX, {**BOX, "id": 8, "category_id": 1, "iscrowd": 1}]
    content = {"images": COCO_IMAGES[:1], "annotations": boxes, "categories": CATEGORIES}
    write(tmp_path / "annotations/instances_train2017.json", content)
    write(tmp_path / "annotations/instances_val2017.json", {**content, "annotations": boxes[:1]})
    picture(tmp_path / "train2017/000000000009.jpg")
    picture(tmp_path / "val2017/000000000009.jpg", "blue")
    return tmp_path


def test_coco(coco_folder: Path) -> None:
    assert find_format(coco_folder).name == find_format(coco_folder / "annotations").name == "coco"
    for place in (coco_folder, coco_folder / "annotations"):
        records, dropped = read(place, "coco")
        assert records["train2017/000000000009"].info == {
            "captions": ["A bowl.", "Food"],
            "objects": [
                {"class": "bowl", "box": [1.5, 2, 4.5, 6]},
                {"class": "person", "box": [1.5, 2, 4.5, 6], "crowd": 1},
            ],
            "split": "train",
            "coco_id": 9,
        }
        other = records["val2017/000000000009"]
        assert other.info["split"] == "val" and other.info["captions"] == [] and len(other.info["objects"]) == 1
        assert other.images != records["train2017/000000000009"].images
        assert dropped == {"train2017/000000000025": f"image file is missing in {coco_folder}"}


def test_karpathys_splits(tmp_path: Path) -> None:
    rows = [
        {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "restval", "cocoid": 42},
        {"filename": "1000092795.jpg", "split": "test", "imgid": 0},
        {"filename": "../out.jpg", "split": "test"},
    ]
    content = {"images": [{**row, "sentences": [{"raw": "A cat.", "tokens": ["a", "cat"]}]} for row in rows]}
    path = write(tmp_path / "dataset_coco.json", content)
    picture(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
    picture(tmp_path / "1000092795.jpg")
    assert find_format(path).name == find_format(tmp_path).name == "karpathy"
    records, dropped = read(path, "karpathy")
    assert records["val2014/COCO_val2014_000000000042"].info == {"captions": ["A cat."], "split": "train", "cocoid": 42}
    assert records["1000092795"].info["split"] == "test"
    assert dropped.keys() == {"../out"} and "leaves the source folder" in dropped["../out"]


def test_vqa(tmp_path: Path) -> None:
    asked = [
        {"image_id": 42, "question": "How many cats?", "question_id": 420},
        {"image_id": 42, "question": "Is it red?", "question_id": 421},
    ]
    people = ["2"] * 3 + ["two"] * 2 + ["a few"] + ["3"] * 2 + ["Few!", "2 "]
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(people, 1)]
    scored = [{"question_id": 420, "image_id": 42, "answer_type": "number", "answers": answers}]
    write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": scored})
    write(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked[1:]})
    image = picture(tmp_path / "images/val2014/COCO_val2014_000000000042.jpg")
    picture(tmp_path / "images/test2015/COCO_test2015_000000000042.jpg")
    assert find_format(tmp_path).name == "vqa"
    records, _ = read(tmp_path, "vqa", images=tmp_path / "images")
    record = records["val2014/COCO_val2014_000000000042"]
    assert record.images == (image,) and record.info["split"] == "val"
    first, second = record.info["questions"]
    # Six of ten people answered 2, as digit or word; two are worth 0.6 each.
    assert first == {
        "question": "How many cats?",
        "answers": pytest.approx({"2": 1.0, "few": 0.6, "3": 0.6}),
        "kind": "number",
        "question_id": 420,
    }
    assert second == {"question": "Is it red?", "answers": {}, "question_id": 421}
    assert records["test-dev2015/COCO_test2015_000000000042"].info["split"] == "test"


def nlvr2_row(identifier: str, label: str, **more: Any) -> dict[str, Any]:
    return {"identifier": identifier, "sentence": f"S {identifier}.", "label": label, "left_url": "", **more}


def test_nlvr2(tmp_path: Path) -> None:
    rows = [nlvr2_row("train-1-0-0", "True", directory=62), nlvr2_row("train-1-0-1", "False", directory=62)]
    write(tmp_path / "data/train.json", rows, lines=True)
    write(tmp_path / "data/test1.json", [nlvr2_row("test1-3-1-0", "False")], lines=True)
    left = picture(tmp_path / "images/train/62/train-1-0-img0.png")
    right = picture(tmp_path / "images/train/62/train-1-0-img1.png", "blue")
    picture(tmp_path / "images/test1/test1-3-1-img0.png")
    assert find_format(tmp_path).name == find_format(tmp_path / "data").name == "nlvr2"
    records, dropped = read(tmp_path, "nlvr2", images=tmp_path / "images")
    record = records["train-1-0"]
    assert record.images == (left, right)
    assert record.info == {
        "statements": [{"text": "S train-1-0-0.", "label": True}, {"text": "S train-1-0-1.", "label": False}],
        "group": "train-1",
        "split": "train",
    }
    assert dropped == {"test1-3-1": f"image file is missing in {tmp_path}/images"}
    assert read(tmp_path / "data/train.json", "nlvr2", images=tmp_path / "images")[0].keys() == {"train-1-0"}


def test_snli_ve(tmp_path: Path) -> None:
    def row(label: str, n: int) -> dict[str, Any]:
        content = {"Flickr30K_ID": "4705552913", "sentence1": "A caption.", "sentence2": f"H {n}.", "gold_label": label}
        return {**content, "pairID": f"4705552913.jpg#{n}"}

    labels = ("contradiction", "neutral", "-", "entailment")
    path = write(tmp_path / "snli_ve_dev.jsonl", [row(label, n) for n, label in enumerate(labels)], lines=True)
    picture(tmp_path / "flickr30k_images/4705552913.jpg")
    assert find_format(path).name == find_format(tmp_path).name == "snli_ve"
    records, dropped = read(tmp_path, "snli_ve", images=tmp_path / "flickr30k_images")
    assert records["4705552913"].info == {
        "entailments": [
            {"text": "H 0.", "label": "contradiction"},
            {"text": "H 1.", "label": "neutral"},
            {"text": "H 3.", "label": "entailment"},
        ],
        "split": "dev",
    }
    assert dropped == {"4705552913.jpg#2": "no gold label"}


def ref(split: str, place: int, *sentences: str) -> dict[str, Any]:
    entries = [{"sent": sentence, "raw": sentence.upper(), "sent_id": i} for i, sentence in enumerate(sentences)]
    return {"ref_id": place, "image_id": 9, "ann_id": place, "split": split, "sentences": entries}


@pytest.fixture
def refcoco_folder(tmp_path: Path) -> Path:
    boxes = [BOX, {**BOX, "id": 8, "category_id": 1}, {**BOX, "id": 5, "image_id": 25}]
    content = {"images": COCO_IMAGES, "annotations": boxes, "categories": CATEGORIES}
    write(tmp_path / "instances.json", content)
    picture(tmp_path / "000000000009.jpg")
    return tmp_path


def test_refcoco(refcoco_folder: Path) -> None:
    content = [ref("train", 8, "the man", "person on the left"), ref("testA", 7, "bowl"), ref("train", 7, "his bowl")]
    path = write(refcoco_folder / "refs(unc).json", content)
    assert find_format(path).name == find_format(refcoco_folder).name == "refcoco"
    records, dropped = read(refcoco_folder, "refcoco")
    assert not dropped and records.keys() == {"train/000000000009", "testA/000000000009"}
    info = records["train/000000000009"].info
    assert [thing["class"] for thing in info["objects"]] == ["bowl", "person"]
    assert info["expressions"] == [
        {"text": "the man", "object": 1, "ref_id": 8},
        {"text": "person on the left", "object": 1, "ref_id": 8},
        {"text": "his bowl", "object": 0, "ref_id": 7},
    ]
    assert info["split"] == "train" and info["coco_id"] == 9
    write(refcoco_folder / "refs(google).json", content)
    with pytest.raises(UserError, match=r"refs\(google\)\.json, refs\(unc\)\.json"):
        read(refcoco_folder, "refcoco")
    assert len(read(path, "refcoco")[0]) == 2


def test_a_pickle_of_expressions_is_not_opened_and_its_remedy_works(
    refcoco_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (refcoco_folder / "refs(unc).p").write_bytes(pickle.dumps([ref("val", 7, "bowl")]))
    assert find_format(refcoco_folder / "refs(unc).p").name == "refcoco"
    with pytest.raises(UserError, match="pickle") as error:
        read(refcoco_folder, "refcoco")
    monkeypatch.chdir(refcoco_folder)
    exec(str(error.value).partition('python -c "')[2].removesuffix('"'))
    assert read(refcoco_folder, "refcoco")[0].keys() == {"val/000000000009"}


def test_vcr(tmp_path: Path) -> None:
    row = {
        "img_fn": "lsmdc_1/a@0.jpg",
        "metadata_fn": "lsmdc_1/a@0.json",
        "objects": ["person", "person", "cup"],
        "question": ["Why", "is", [0, 1], "holding", [2], "?"],
        "answer_choices": [["To", "drink"], [[1], "asked"], ["No"], ["Yes"]],
        "answer_label": 1,
        "rationale_choices": [[[1], "waves"], ["a"], ["b"], ["c"]],
        "rationale_label": 0,
        "annot_id": "val-0",
    }
    test = {name: value for name, value in row.items() if not name.endswith("label")}
    write(tmp_path / "val.jsonl", [row], lines=True)
    write(tmp_path / "test.jsonl", [test, {**row, "img_fn": "b.jpg", "metadata_fn": "b.json"}], lines=True)
    write(tmp_path / "vcr1images/lsmdc_1/a@0.json", {"boxes": [[1, 2, 3, 4, 0.9]] * 3, "width": 8, "height": 6})
    picture(tmp_path / "vcr1images/lsmdc_1/a@0.jpg")
    assert find_format(tmp_path).name == "vcr"
    records, dropped = read(tmp_path / "val.jsonl", "vcr")
    assert records["lsmdc_1/a@0"].info == {
        "objects": [{"class": kind, "box": [1, 2, 3, 4]} for kind in row["objects"]],
        "choices": [
            {
                "question": "Why is person 1 and person 2 holding cup 3 ?",
                "answers": ["To drink", "person 2 asked", "No", "Yes"],
                "right": 1,
                "rationales": ["person 2 waves", "a", "b", "c"],
                "right_rationale": 0,
                "annot_id": "val-0",
            }
        ],
        "split": "val",
    }
    records, dropped = read(tmp_path / "test.jsonl", "vcr")
    (choice,) = records["lsmdc_1/a@0"].info["choices"]
    assert "right" not in choice and "right_rationale" not in choice
    assert list(dropped) == ["b"] and "b.json: No such file" in dropped["b"]


PUBLISHED = [name for name, source in formats().items() if issubclass(source, AnnotationSource)]


@pytest.mark.parametrize("format", PUBLISHED)
def test_a_folder_without_the_formats_files_is_refused_with_what_it_should_hold(tmp_path: Path, format: str) -> None:
    with pytest.raises(UserError, match=f"nothing of the format {format} is here") as error:
        read(tmp_path, format)
    assert formats()[format].summary in str(error.value)


def test_files_of_another_form_are_named(coco_folder: Path) -> None:
    for content, message in (("[]", "not in the form of COCO's annotations"), ("{", "not JSON")):
        (coco_folder / "annotations/captions_train2017.json").write_text(content)
        with pytest.raises(UserError, match=rf"captions_train2017\.json: {message}"):
            read(coco_folder, "coco")


def test_the_command_knows_every_format(coco_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builtin = [source for source in formats().values() if source.__module__.startswith("fastvlp.")]
    assert len(builtin) == 16 and len(PUBLISHED) == 8
    for name, source in formats().items():
        assert f"  {name} " in formats_help() and source.summary in formats_help()
    assert main(["data", "import", str(coco_folder), "--out", str(coco_folder / "out")]) == 0
    assert "train 1, val 1" in capsys.readouterr().out
