"""COCO (Lin et al. 2014, arXiv 1405.0312) as published: `annotations/` with `captions_NAME.json` and `instances_NAME.json`,
whose boxes become objects, and images in `NAME/`; either file will do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.paths import Images, in_form, pictured, read_json, xyxy

FORM = "COCO's annotations"
FILES = ("captions", "instances")


def sets(path: Path) -> dict[str, dict[str, Path]]:
    """{set, as `train2017`: {kind: file}} of COCO's folder or its `annotations`."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for kind in FILES:
        for file in sorted((*path.glob(f"{kind}_*.json"), *path.glob(f"annotations/{kind}_*.json"))):
            found[file.stem.removeprefix(f"{kind}_")][kind] = file
    return dict(sorted(found.items()))


def files(path: Path) -> list[Path]:
    return [file for kinds in sets(path).values() for file in kinds.values()]


def read(path: Path, images: Images | None = None) -> Iterator[Record | Dropped]:
    """Yields one record an image, keyed `NAME/file`, in the split that the set's name begins with."""
    root = images or (path.parent if path.name == "annotations" else path)
    for name, files in sets(path).items():
        file_of: dict[Any, str] = {}
        said: dict[Any, dict[str, list[Any]]] = defaultdict(lambda: {"captions": [], "objects": []})
        for kind, file in files.items():
            told = read_json(file)
            with in_form(file, FORM):
                file_of |= {image["id"]: image["file_name"] for image in told["images"]}
                classes = {category["id"]: category["name"] for category in told.get("categories", [])}
                for item in told["annotations"]:
                    one = said[item["image_id"]]
                    if kind == "captions":
                        one["captions"].append(item["caption"])
                    else:
                        one["objects"].append(instance(item, classes))
        for place, file_name in file_of.items():
            info = {**said[place], "split": split_of(name), "coco_id": place}
            yield pictured(f"{name}/{Path(file_name).stem}", info, root, f"{name}/{file_name}")


def instance(item: dict[str, Any], classes: dict[Any, str]) -> dict[str, Any]:
    crowd = {"crowd": 1} if item.get("iscrowd") else {}
    return {"class": classes[item["category_id"]], "box": xyxy(item["bbox"]), **crowd}


def split_of(name: str) -> str:
    return next((split for split in ("train", "val") if name.startswith(split)), "test")
