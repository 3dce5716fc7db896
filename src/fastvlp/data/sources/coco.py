"""COCO's annotations (Lin et al. 2014, arXiv 1405.0312): the published folder, a file of your own, or Roboflow's export."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped
from fastvlp.data.records.schema import box_fault
from fastvlp.data.sources.interface import AnnotationSource, Item, Match
from fastvlp.data.sources.source_files import (
    FORM_ERRORS,
    each_row,
    expect_form,
    find_image,
    form_fault,
    image_record,
    is_there,
    read_json,
    to_corners,
)
from fastvlp.data.sources.split_names import usual_split

SPLITS = ("train", "val", "test")
KINDS = ("captions", "instances")
ROBOFLOW = "_annotations.coco.json"
_HEAD = 1 << 16


@dataclass(frozen=True, kw_only=True)
class CocoSource(AnnotationSource):
    """COCO's captions, its boxes as objects, or both."""

    name = "coco"
    summary = (
        "COCO's folder (annotations/captions_*.json, instances_*.json, images), one such file, or Roboflow's export"
    )

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        return [file for files in annotation_files(path).values() for file in files]

    @classmethod
    def match(cls, path: Path) -> Match:
        if path.is_dir():
            return super().match(path)
        return Match.NAMES if path.suffix.lower() == ".json" and _is_coco(path) else Match.NONE

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record an image, keyed `NAME/file`, in the split that NAME begins with, if it does. An annotation of
        another form is dropped by its id, and an image that has nothing else with it."""
        for name, files in annotation_files(path).items():
            file_of: dict[Any, str] = {}
            texts_and_boxes: dict[Any, dict[str, list[Any]]] = defaultdict(lambda: {"captions": [], "objects": []})
            faults: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
            for file in files:
                content = read_json(file)

                def add_image(image: dict[str, Any], file_of: dict[Any, str] = file_of) -> None:
                    file_of[image["id"]] = str(image["file_name"])

                with expect_form(file, "COCO's annotations"):
                    images = list(content["images"])
                    classes = {category["id"]: category["name"] for category in content.get("categories", [])}
                    annotations = list(content["annotations"])
                yield from each_row(images, f"{file.name}: image", add_image)
                for item in annotations:
                    add_annotation(item, classes, texts_and_boxes, faults)
            split = split_of(name)
            for image_id, file_name in file_of.items():
                stem = Path(file_name).with_suffix("")
                key = f"{name}/{stem.name}" if name else str(stem)
                info = {**texts_and_boxes[image_id], **({"split": split} if split else {}), "coco_id": image_id}
                wrong = faults.pop(image_id, [])
                if wrong and not info["captions"] and not info["objects"]:
                    reason = "; ".join(f"annotation {number}: {fault}" for number, fault in wrong)
                    yield Dropped(key=key, reason=reason, file=file_name)
                    continue
                yield from (Dropped(key=f"{key}: annotation {number}", reason=fault) for number, fault in wrong)
                yield image_record(key, info, *self._place(files[0], name, file_name))
            for image_id, wrong in faults.items():
                yield from (
                    Dropped(key=f"annotation {number} of image {image_id}", reason=fault) for number, fault in wrong
                )
            for image_id in texts_and_boxes.keys() - file_of.keys():
                yield Dropped(key=f"image {image_id}", reason="has annotations, and is not among the images")

    def _place(self, file: Path, name: str, file_name: str) -> tuple[Path | None, str]:
        """The folder of images, given or usual, and the path of an image in it: in `NAME/` or one of the usual folders."""
        usual = file.parent.parent if file.parent.name == "annotations" else file.parent
        root = self.image_folder(usual)
        if root is None:
            return None, file_name
        names = [f"{name}/{file_name}", file_name, f"images/{file_name}", f"images/{name}/{file_name}"]
        names += [
            f"{stem}/{file_name}" for stem in (split_of(name), "val2014" if "val" in name else "train2014") if stem
        ]
        there = (one for one in names if (path := find_image(root, one)) is not None and is_there(path))
        return root, next(there, names[0] if name else file_name)


def annotation_files(path: Path) -> dict[str, list[Path]]:
    """{NAME, as `train2017`: its files} of a folder, its `annotations`, or one file. A name that says nothing is empty."""
    if path.is_file():
        return {_set_name(path): [path]}
    files: dict[str, list[Path]] = defaultdict(list)
    for kind in KINDS:
        for file in sorted((*path.glob(f"{kind}_*.json"), *path.glob(f"annotations/{kind}_*.json"))):
            files[file.stem.removeprefix(f"{kind}_")].append(file)
    if not files:
        for file in sorted((*path.glob(ROBOFLOW), *path.glob(f"*/{ROBOFLOW}"))):
            files[_set_name(file)].append(file)
    return dict(sorted(files.items()))


def _set_name(file: Path) -> str:
    """Returns the name of the data set in a file name: `train2017` of `instances_train2017.json`, `valid` of
    `valid/_annotations.coco.json`."""
    if file.name == ROBOFLOW:
        return file.parent.name if split_of(file.parent.name) else ""
    kind = next((kind for kind in KINDS if file.name.startswith(f"{kind}_")), None)
    return file.stem.removeprefix(f"{kind}_") if kind else ""


def _is_coco(file: Path) -> bool:
    """Whether the name of a .json, or its beginning, is that of COCO's annotations."""
    if file.name == ROBOFLOW or any(file.name.startswith(f"{kind}_") for kind in KINDS):
        return True
    with file.open("rb") as stream:
        head = stream.read(_HEAD).decode("utf-8", "replace")
    return re.match(r"\ufeff?\s*{", head) is not None and re.search(_IMAGES, head) is not None


# The list of images begins with the fields that COCO's images have, or the file with another of its lists.
_IMAGES = re.compile(
    r'"images"\s*:\s*\[\s*{[^{}]*"file_name"|"annotations"\s*:\s*\[\s*{[^{}]*"image_id"|"categories"\s*:\s*\[\s*{[^{}]*"id"'
)


def add_annotation(
    item: Any,
    classes: dict[Any, str],
    texts_and_boxes: dict[Any, dict[str, list[Any]]],
    faults: dict[Any, list[tuple[Any, str]]],
) -> None:
    """Adds a caption or an object to its image, or what is wrong with it to the image's faults."""
    number = item.get("id", "without an id") if isinstance(item, dict) else json.dumps(item)[:40]
    image_id = item.get("image_id") if isinstance(item, dict) else None
    try:
        if "caption" in item:
            if not isinstance(item["caption"], str):
                raise TypeError("its caption is no text")
            texts_and_boxes[item["image_id"]]["captions"].append(item["caption"])
        else:
            thing = instance(item, classes)
            texts_and_boxes[item["image_id"]]["objects"].append(thing)
    except FORM_ERRORS as error:
        faults[image_id if isinstance(image_id, str | int) else None].append((number, form_fault(error)))


def instance(item: dict[str, Any], classes: dict[Any, str]) -> dict[str, Any]:
    """An annotated instance as an object of a record; `crowd` marks a box around many."""
    crowd = {"crowd": 1} if item.get("iscrowd") else {}
    box = item["bbox"]
    corners = to_corners(box) if isinstance(box, list) and len(box) == 4 else box
    if wrong := box_fault(corners):
        raise ValueError(f"bbox {box} is not x, y, width, height" if corners is box else wrong)
    return {"class": classes[item["category_id"]], "box": corners, **crowd}


def split_of(name: str) -> str:
    """`train`, `val` or `test` of a name that begins with it, such as `train2017`; empty for any other name."""
    beginning = name.lower().removeprefix("mini")
    usual = usual_split(re.split(r"[^a-z]", beginning)[0])
    if usual in SPLITS:
        return usual
    return {"trainval": "train", "valminusminival": "val"}.get(re.split(r"[^a-z]", beginning)[0], "")
