"""The splits of COCO, Flickr30k and Flickr8k that captioning and retrieval are measured on (Karpathy and Li 2015, arXiv
1412.2306): `dataset_coco.json`, `dataset_flickr30k.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.paths import Images, in_form, pictured, read_json


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("dataset_*.json"))


def read(path: Path, images: Images | None = None) -> Iterator[Record | Dropped]:
    """Yields one record an image; `restval`, COCO's validation images that are in no test, are trained on. Images are in
    the folder that an image's `filepath` names, if it names one."""
    for file in files(path):
        told = read_json(file)
        with in_form(file, "Karpathy's splits"):
            rows = [_image(row) for row in told["images"]]
        for name, info in rows:
            yield pictured(str(PurePosixPath(name).with_suffix("")), info, images or file.parent, name)


def _image(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    info: dict[str, Any] = {name: row[name] for name in ("imgid", "cocoid") if name in row}
    info["captions"] = [sentence["raw"] for sentence in row["sentences"]]
    info["split"] = "train" if row["split"] == "restval" else row["split"]
    return str(PurePosixPath(row.get("filepath", ""), row["filename"])), info
