"""Small sources of every format that can be imported, written so that a value of one of their records can be damaged."""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

# Images of a source.
COUNT = 6


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (40 * i, 200 - 30 * i, 90)).save(file, "PNG")
    return file.getvalue()


class Made:
    """A source in a folder: its files as JSON that can be damaged, written by `write`.

    Attributes:
        path: what is imported.
        rows: lists of rows, one of which is damaged; each with the function that writes the file anew.
    """

    def __init__(self, folder: Path):
        self.folder = self.path = folder
        folder.mkdir()
        self.rows: list[tuple[list[Any], Callable[[], None]]] = []

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def add_json(self, name: str, content: Any, *lists: str) -> None:
        """`lists`: keys of the lists of rows within `content`; without, it is such a list itself."""

        def write() -> None:
            self.put(name, json.dumps(content).encode("utf-8", "surrogatepass"))

        self.rows += [(content[key], write) for key in lists] if lists else [(content, write)]
        write()

    def add_lines(self, name: str, rows: list[Any]) -> None:
        def write() -> None:
            self.put(name, "\n".join(map(json.dumps, rows)).encode())

        self.rows.append((rows, write))
        write()

    def pictures(self, pattern: str) -> None:
        for i in range(COUNT):
            self.put(pattern.format(i), picture(i))


def karpathy(made: Made) -> None:
    rows = [
        {"filepath": "val2014", "filename": f"{i}.png", "split": "train", "cocoid": i, "sentences": [{"raw": f"a {i}"}]}
        for i in range(COUNT)
    ]
    made.add_json("dataset_coco.json", {"images": rows}, "images")
    made.pictures("val2014/{}.png")


def coco(made: Made) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(COUNT)]
    texts = [{"image_id": i, "id": i, "caption": f"a {i}"} for i in range(COUNT)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 2, 3], "iscrowd": 0} for i in range(COUNT)]
    made.add_json(
        "annotations/captions_train2017.json", {"images": images, "annotations": texts}, "images", "annotations"
    )
    content = {
        "images": [dict(image) for image in images],
        "annotations": boxes,
        "categories": [{"id": 1, "name": "cat"}],
    }
    made.add_json("annotations/instances_train2017.json", content, "images", "annotations")
    made.pictures("train2017/{}.png")


def vqa(made: Made) -> None:
    questions = [{"question_id": i, "image_id": i, "question": f"what is {i}?"} for i in range(COUNT)]
    answers = [
        {"question_id": i, "answers": [{"answer": "cat"} for _ in range(10)], "answer_type": "other"}
        for i in range(COUNT)
    ]
    made.add_json("v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions}, "questions")
    made.add_json("v2_mscoco_train2014_annotations.json", {"annotations": answers}, "annotations")
    for i in range(COUNT):
        made.put(f"train2014/COCO_train2014_{i:012d}.jpg", picture(i))


def vcr(made: Made) -> None:
    rows = [
        {
            "img_fn": f"m/{i}.jpg", "metadata_fn": f"m/{i}.json", "objects": ["person"], "annot_id": f"train-{i}",
            "question": ["who", "is", [0], "?"], "answer_choices": [["x"], ["y"], ["z"], ["w"]], "answer_label": 1,
            "rationale_choices": [["a"], ["b"], ["c"], ["d"]], "rationale_label": 2,
        }
        for i in range(COUNT)
    ]  # fmt: skip
    made.add_lines("train.jsonl", rows)
    for i in range(COUNT):
        made.put(f"vcr1images/m/{i}.jpg", picture(i))
        made.put(f"vcr1images/m/{i}.json", json.dumps({"boxes": [[0, 0, 4, 4, 0.9]]}).encode())


def nlvr2(made: Made) -> None:
    rows = [{"identifier": f"test1-{i}-0-0", "sentence": f"there are {i}", "label": "True"} for i in range(COUNT)]
    made.add_lines("data/test1.json", rows)
    for i in range(COUNT):
        for k in (0, 1):
            made.put(f"data/test1/test1-{i}-0-img{k}.png", picture(i))


def nlvr(made: Made) -> None:
    def box() -> list[Any]:
        return [{"x_loc": 1, "y_loc": 2, "size": 10, "type": "circle", "color": "Yellow"}]

    rows = [
        {
            "identifier": f"{i}-0", "directory": "d", "label": "true", "sentence": f"there are {i}",
            "structured_rep": [box(), box(), box()],
        }
        for i in range(COUNT)
    ]  # fmt: skip
    made.add_lines("train/train.json", rows)
    for i in range(COUNT):
        for k in range(6):
            made.put(f"train/images/d/train-{i}-0-{k}.png", picture(i))


def refcoco(made: Made) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(COUNT)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 2, 3]} for i in range(COUNT)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    made.add_json("instances.json", content, "images", "annotations")
    refs = [
        {"ref_id": i, "ann_id": i, "image_id": i, "split": "train", "sentences": [{"sent": f"the {i}"}]}
        for i in range(COUNT)
    ]
    made.add_json("refs(unc).json", refs)
    made.pictures("{}.png")


def chinese_clip(made: Made) -> None:
    made.add_lines("train_texts.jsonl", [{"text_id": i, "text": f"一 {i}", "image_ids": [i]} for i in range(COUNT)])
    lines = "\n".join(f"{i}\t{base64.b64encode(picture(i)).decode()}" for i in range(COUNT))
    made.put("train_imgs.tsv", lines.encode())


def snli_ve(made: Made) -> None:
    rows = [
        {"Flickr30K_ID": str(i), "sentence2": f"a {i}", "gold_label": "neutral", "pairID": f"p{i}"}
        for i in range(COUNT)
    ]
    made.add_lines("snli_ve_train.jsonl", rows)
    made.pictures("{}.jpg")


def examples(made: Made) -> None:
    rows = [
        {
            "image": f"i{i}", "file": f"{i}.png", "captions": [f"a {i}"], "qa": [{"q": "what?", "a": "cat"}],
            "boxes": [{"label": "cat", "bbox_xywh": [1, 1, 2, 2]}],
        }
        for i in range(COUNT)
    ]  # fmt: skip
    made.add_lines("examples.jsonl", rows)
    with zipfile.ZipFile(made.folder / "images.zip", "w") as archive:
        for i in range(COUNT):
            archive.writestr(f"{i}.png", picture(i))


def lines(made: Made) -> None:
    made.add_lines("pairs.jsonl", [{"image": f"{i}.png", "caption": f"a {i}", "label": i} for i in range(COUNT)])
    made.pictures("{}.png")
    made.path = made.folder / "pairs.jsonl"


def listed(made: Made) -> None:
    def turns() -> list[Any]:
        return [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]

    made.add_json("pairs.json", [{"id": i, "image": f"{i}.png", "conversations": turns()} for i in range(COUNT)])
    made.pictures("{}.png")
    made.path = made.folder / "pairs.json"


def table(made: Made) -> None:
    rows = [{"image": f"{i}.png", "caption": f"a {i}"} for i in range(COUNT)]

    def write() -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["image", "caption"])
        for row in rows:
            # A blank line is no record.
            writer.writerow(
                [str(value) for value in row.values()] or ["x"] if isinstance(row, dict) else [str(row).strip() or "x"]
            )
        made.put("pairs.csv", text.getvalue().encode("utf-8", "surrogatepass"))

    made.rows.append((rows, write))
    write()
    made.pictures("{}.png")
    made.path = made.folder / "pairs.csv"


def image_folder(made: Made) -> None:
    made.add_lines("metadata.jsonl", [{"file_name": f"{i}.png", "text": f"a {i}"} for i in range(COUNT)])
    made.pictures("{}.png")


def webdataset(made: Made) -> None:
    rows = [{"caption": f"a {i}", "more": {"x": [1, 2]}} for i in range(COUNT)]

    def write() -> None:
        with tarfile.open(made.folder / "00000.tar", "w") as tar:
            for i, row in enumerate(rows):
                text = json.dumps(row).encode()
                for name, data in ((f"{i}.png", picture(i)), (f"{i}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    made.rows.append((rows, write))
    write()


def beside(made: Made) -> None:
    rows = [{"caption": f"a {i}"} for i in range(COUNT)]

    def write() -> None:
        for i, row in enumerate(rows):
            made.put(f"pictures/{i}.json", json.dumps(row).encode())

    made.rows.append((rows, write))
    write()
    made.pictures("pictures/{}.png")


SOURCES: list[Callable[[Made], None]] = [
    karpathy, coco, vqa, vcr, nlvr2, nlvr, refcoco, chinese_clip, snli_ve, examples, lines, listed, table, image_folder,
    webdataset, beside,
]  # fmt: skip
FORMATS = {"beside": "folder"}
