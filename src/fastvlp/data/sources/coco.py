"""COCO (Lin et al. 2014, arXiv 1405.0312) as published: `annotations/captions_NAME.json` and `annotations/instances_NAME.json`,
and images in `NAME/`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import AnnotationSource
from fastvlp.data.sources.source_files import expect_form, image_record, read_json, to_corners

KINDS = ("captions", "instances")


@dataclass(frozen=True, kw_only=True)
class CocoSource(AnnotationSource):
    """COCO's captions, its boxes as objects, or both."""

    name = "coco"
    summary = "COCO's folder: annotations/captions_*.json, instances_*.json or both, and images"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        return [file for kinds in annotation_files(path).values() for file in kinds.values()]

    def records(self, path: Path) -> Iterator[Record | Dropped]:
        """Yields one record an image, keyed `NAME/file`, in the split that NAME begins with."""
        root = self.image_folder(path.parent if path.name == "annotations" else path)
        for name, kinds in annotation_files(path).items():
            file_of: dict[Any, str] = {}
            texts_and_boxes: dict[Any, dict[str, list[Any]]] = defaultdict(lambda: {"captions": [], "objects": []})
            for kind, file in kinds.items():
                content = read_json(file)
                with expect_form(file, "COCO's annotations"):
                    file_of |= {image["id"]: image["file_name"] for image in content["images"]}
                    classes = {category["id"]: category["name"] for category in content.get("categories", [])}
                    for item in content["annotations"]:
                        image = texts_and_boxes[item["image_id"]]
                        if kind == "captions":
                            image["captions"].append(item["caption"])
                        else:
                            image["objects"].append(instance(item, classes))
            for image_id, file_name in file_of.items():
                info = {**texts_and_boxes[image_id], "split": split_of(name), "coco_id": image_id}
                yield image_record(f"{name}/{Path(file_name).stem}", info, root, f"{name}/{file_name}")


def annotation_files(path: Path) -> dict[str, dict[str, Path]]:
    """{NAME, as `train2017`: {kind: file}} of COCO's folder or its `annotations`."""
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    for kind in KINDS:
        for file in sorted((*path.glob(f"{kind}_*.json"), *path.glob(f"annotations/{kind}_*.json"))):
            files[file.stem.removeprefix(f"{kind}_")][kind] = file
    return dict(sorted(files.items()))


def instance(item: dict[str, Any], classes: dict[Any, str]) -> dict[str, Any]:
    """An annotated instance as an object of a record; `crowd` marks a box around many."""
    crowd = {"crowd": 1} if item.get("iscrowd") else {}
    return {"class": classes[item["category_id"]], "box": to_corners(item["bbox"]), **crowd}


def split_of(name: str) -> str:
    """`train`, `val` or `test` of a name such as `train2017`."""
    return next((split for split in ("train", "val") if name.startswith(split)), "test")
