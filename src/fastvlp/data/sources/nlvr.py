"""Cornell NLVR (Suhr et al. 2017, aclanthology.org/P17-2034) as its repository has it: `train/train.json`, `train/images/`,
dev and test likewise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import Item, Match, Source
from fastvlp.data.sources.source_files import number_of_lines, read_image, read_json_lines
from fastvlp.errors import UserError

SPLITS = ("train", "dev", "test")
# Image k of an example shows its boxes in this order; an example's label holds for all six.
BOX_ORDERS = tuple(itertools.permutations(range(3)))
BOX_STRIDE = 150  # boxes are 100 px wide with 50 px between them


@dataclass(frozen=True, kw_only=True)
class NLVRSource(Source):
    """Statements about rendered boxes of shapes."""

    name = "nlvr"
    summary = "Cornell NLVR's folder: train/train.json and train/images/; the same for dev and test"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if _split_files(path) else Match.NONE

    def read(self, path: Path) -> Iterator[Item]:
        """Yields six records an example, keyed `{split}-{n}-{m}-{k}`; the records of example n share their `group`."""
        files = _split_files(path)
        if not files:
            raise UserError(f"{path}: no train/train.json, dev/dev.json or test/test.json, the official layout of NLVR")
        for split, file in files.items():
            for row in read_json_lines(file):
                if isinstance(row, Dropped):
                    yield row
                else:
                    yield from _records(path / split, split, row)

    def count(self, path: Path) -> int:
        """Counts rows; one without a sentence yields one item instead of six."""
        return len(BOX_ORDERS) * sum(map(number_of_lines, _split_files(path).values()))


def statement_info(name: str, k: int, text: str, label: bool, boxes: Any) -> dict[str, Any]:
    """The info of image `k` of the example `{split}-{n}-{m}`."""
    return {
        "identifier": name,
        "group": name.rpartition("-")[0],
        "permutation": k,
        "statements": [{"text": text, "label": label}],
        "objects": _objects(boxes, BOX_ORDERS[k]) if isinstance(boxes, list) and len(boxes) == 3 else [],
    }


def _split_files(path: Path) -> dict[str, Path]:
    files = {split: path / split / f"{split}.json" for split in SPLITS}
    return {split: file for split, file in files.items() if file.is_file()}


def _records(folder: Path, split: str, row: dict[str, Any]) -> Iterator[Record | Dropped]:
    """The records of one example."""
    name = f"{split}-{row.get('identifier')}"
    label = {"true": True, "false": False}.get(str(row.get("label")).lower())
    if label is None or not isinstance(row.get("sentence"), str):
        yield Dropped(key=name, reason="no sentence or no label")
        return
    for k in range(len(BOX_ORDERS)):
        key = f"{name}-{k}"
        image = read_image(folder, f"images/{row.get('directory')}/{key}.png", key)
        try:
            info = statement_info(name, k, row["sentence"], label, row.get("structured_rep"))
        except (KeyError, TypeError, AttributeError):
            yield Dropped(key=key, reason="its structured_rep is not in the official form")
            continue
        if isinstance(image, Dropped):
            yield image
        else:
            yield Record(key=key, images=(image,), info={**info, "split": split})


def _objects(boxes: list[list[dict[str, Any]]], order: tuple[int, ...]) -> list[dict[str, Any]]:
    """The items of three boxes as objects in pixels of the 400x100 image."""
    colours = {"#0099ff": "blue"}
    return [
        {
            "class": f"{colours.get(item['color'], item['color'].lower())} {item['type']}",
            "box": [
                place * BOX_STRIDE + item["x_loc"],
                item["y_loc"],
                place * BOX_STRIDE + item["x_loc"] + item["size"],
                item["y_loc"] + item["size"],
            ],
        }
        for place, box in enumerate(order)
        for item in boxes[box]
    ]
