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

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

# Images of a source.
COUNT = 6


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (40 * i, 200 - 30 * i, 90)).save(file, "PNG")
    return file.getvalue()


class Made:
    """A source in a folder: its files as JSON or bytes that can be damaged, written by `write`.

    Attributes:
        path: what is imported.
        options: of the import.
        rows: lists of rows, one of which is damaged; each with the function that writes the file anew.
    """

    def __init__(self, folder: Path):
        self.folder = self.path = folder
        folder.mkdir()
        self.options: dict[str, Any] = {}
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

    def pictures(self, pattern: str, copies: int = 1) -> None:
        """`copies` files of each image, numbered in the pattern's second place."""
        for k in range(copies):
            self.add_files([pattern.format(i, k) for i in range(COUNT)], [picture(i) for i in range(COUNT)])

    def add_files(self, names: list[str], rows: list[Any]) -> None:
        """A file for each row, of bytes or of JSON; None is a file that is missing."""

        def write() -> None:
            for name, row in zip(names, rows):
                path = self.put(name, bytes_of(row))
                if row is None:
                    path.unlink()

        self.rows.append((rows, write))
        write()


def text_of(value: Any) -> str:
    """A value as a table or a text file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def bytes_of(value: Any) -> bytes:
    return value if isinstance(value, bytes) else text_of(value).encode("utf-8", "surrogatepass")


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
    made.pictures("train2014/COCO_train2014_{:012d}.jpg")


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
    made.pictures("vcr1images/m/{}.jpg")
    boxes = [{"boxes": [[0, 0, 4, 4, 0.9]]} for _ in range(COUNT)]
    made.add_files([f"vcr1images/m/{i}.json" for i in range(COUNT)], boxes)


def nlvr2(made: Made) -> None:
    rows = [{"identifier": f"test1-{i}-0-0", "sentence": f"there are {i}", "label": "True"} for i in range(COUNT)]
    made.add_lines("data/test1.json", rows)
    made.pictures("data/test1/test1-{}-0-img{}.png", copies=2)


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
    made.pictures("train/images/d/train-{}-0-{}.png", copies=6)


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
    images = [[str(i), picture(i)] for i in range(COUNT)]

    def write() -> None:
        cells = [row if isinstance(row, list) else [row] for row in images]
        texts = [[base64.b64encode(x).decode() if isinstance(x, bytes) else text_of(x) for x in row] for row in cells]
        made.put("train_imgs.tsv", "\n".join(map("\t".join, texts)).encode("utf-8", "surrogatepass"))

    made.rows.append((images, write))
    write()


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
    images: list[Any] = [picture(i) for i in range(COUNT)]

    def write() -> None:
        with zipfile.ZipFile(made.folder / "images.zip", "w") as archive:
            for i, image in enumerate(images):
                if image is not None:
                    archive.writestr(f"{i}.png", bytes_of(image))

    made.rows.append((images, write))
    write()


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
    rows: list[Any] = [{"caption": f"a {i}", "more": {"x": [1, 2]}} for i in range(COUNT)]
    images: list[Any] = [picture(i) for i in range(COUNT)]

    def write() -> None:
        with tarfile.open(made.folder / "00000.tar", "w") as tar:
            for i, (row, image) in enumerate(zip(rows, images)):
                for name, content in ((f"{i}.png", bytes_of(image)), (f"{i}.json", json.dumps(row).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    made.rows += [(rows, write), (images, write)]
    write()


def beside(made: Made) -> None:
    made.add_files([f"pictures/{i}.json" for i in range(COUNT)], [{"caption": f"a {i}"} for i in range(COUNT)])
    made.pictures("pictures/{}.png")
    made.options = {"format": "folder"}


def classes(made: Made) -> None:
    made.pictures("train/cat/{}.png")
    made.pictures("train/dog/{}.png")


def flickr(made: Made) -> None:
    rows: list[Any] = [f"{i}.png#0\ta {i}" for i in range(COUNT)]

    def write() -> None:
        # A blank line is no record.
        lines = [" ".join(text_of(row).split("\n")).strip() or "x" for row in rows]
        made.put("flickr.token", "\n".join(lines).encode("utf-8", "surrogatepass"))

    made.rows.append((rows, write))
    write()
    made.pictures("{}.png")
    made.path = made.folder / "flickr.token"


def column(rows: list[Any], name: str, kind: pa.DataType, type_: type) -> pa.Array:
    """The values of a field; null where one is of another type, which a column cannot hold."""

    def cell(row: Any) -> Any:
        value = row.get(name) if isinstance(row, dict) else None
        # pyarrow takes an empty list or text for a struct by itself, and refuses it among others.
        if not isinstance(value, type_):
            return None
        try:
            pa.array([value], kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return None
        return value

    return pa.array([cell(row) for row in rows], kind)


def columns(rows: list[Any]) -> pa.Table:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    kinds = {"image": (image, dict), "text": (pa.string(), str), "tags": (pa.list_(pa.string()), list)}
    return pa.table({name: column(rows, name, *kind) for name, kind in kinds.items()})


def cells() -> list[Any]:
    return [{"image": {"bytes": picture(i), "path": None}, "text": f"a {i}", "tags": ["x"]} for i in range(COUNT)]


def hub_parquet(made: Made) -> None:
    rows = cells()

    def write() -> None:
        (made.folder / "data").mkdir(exist_ok=True)
        parquet.write_table(columns(rows), made.folder / "data" / "train-00000-of-00001.parquet")

    made.rows.append((rows, write))
    write()


def saved_dataset(made: Made) -> None:
    rows = cells()

    def write() -> None:
        table = columns(rows)
        with pa.OSFile(str(made.folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)

    made.rows.append((rows, write))
    write()
    made.put("state.json", json.dumps({"_data_files": [{"filename": "data.arrow"}], "_split": "train"}).encode())
    made.put("dataset_info.json", b'{"features": {}}')


def regions(made: Made) -> None:
    """A detector's regions, each image's in an npz."""
    lines(made)
    draw, files = np.random.default_rng(0), []
    for _ in range(COUNT):
        low, size = draw.uniform(0, 0.5, (3, 2)), draw.uniform(0.1, 0.5, (3, 2))
        arrays = {"norm_bb": np.concatenate([low, low + size, size], 1), "features": draw.normal(size=(3, 6))}
        file = io.BytesIO()
        np.savez(file, **{name: x.astype(np.float16) for name, x in arrays.items()}, conf=draw.uniform(size=3))
        files.append(file.getvalue())
    made.add_files([f"regions/{i}.npz" for i in range(COUNT)], files)
    made.options = {"images": "blank", "features": made.folder / "regions"}


SOURCES: list[Callable[[Made], None]] = [
    karpathy, coco, vqa, vcr, nlvr2, nlvr, refcoco, chinese_clip, snli_ve, examples, lines, listed, table, image_folder,
    webdataset, beside, classes, flickr, hub_parquet, saved_dataset, regions,
]  # fmt: skip
