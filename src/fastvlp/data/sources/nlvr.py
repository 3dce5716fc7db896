"""Cornell NLVR (Suhr et al. 2017) as its repository has it: `train/train.json`, `train/images/`, dev and test alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.jsonlines import read_json_lines
from fastvlp.data.sources.paths import read_inside
from fastvlp.errors import UserError

SPLITS = ("train", "dev", "test")
# Image k of an example shows its boxes in this order; an example's label holds for all six.
BOX_ORDERS = tuple(itertools.permutations(range(3)))
BOX_STRIDE = 150  # boxes are 100 px wide with 50 px between them


def splits(path: Path) -> list[str]:
    return [split for split in SPLITS if (path / split / f"{split}.json").is_file()]


def read(path: Path) -> Iterator[Record | Dropped]:
    """Yields six records an example, keyed `{split}-{n}-{m}-{k}`; `group` is what siblings n share, for splitting."""
    found = splits(path)
    if not found:
        raise UserError(f"{path}: no train/train.json, dev/dev.json or test/test.json, the official layout of NLVR")
    for split in found:
        for row in read_json_lines(path / split / f"{split}.json"):
            name = f"{split}-{row.get('identifier')}"
            label = {"true": True, "false": False}.get(str(row.get("label")).lower())
            if label is None or not isinstance(row.get("sentence"), str):
                yield Dropped(key=name, reason="no sentence or no label")
                continue
            for k in range(len(BOX_ORDERS)):
                file = f"images/{row.get('directory')}/{name}-{k}.png"
                image = read_inside(path / split, file, f"{name}-{k}")
                try:
                    info = statement_info(name, k, row["sentence"], label, row.get("structured_rep"))
                except (KeyError, TypeError, AttributeError):
                    yield Dropped(key=f"{name}-{k}", reason="its structured_rep is not in the official form")
                    continue
                yield (
                    image
                    if isinstance(image, Dropped)
                    else Record(key=f"{name}-{k}", images=(image,), info={**info, "split": split})
                )


def count(path: Path) -> int:
    """How many items `read` will yield when every row has a sentence."""
    return sum(len(BOX_ORDERS) for split in splits(path) for _ in read_json_lines(path / split / f"{split}.json"))


def statement_info(name: str, k: int, text: str, label: bool, boxes: Any) -> dict[str, Any]:
    """The info of image `k` of the example `{split}-{n}-{m}`."""
    return {
        "identifier": name,
        "group": name.rpartition("-")[0],
        "permutation": k,
        "statements": [{"text": text, "label": label}],
        "objects": _objects(boxes, BOX_ORDERS[k]) if isinstance(boxes, list) and len(boxes) == 3 else [],
    }


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
