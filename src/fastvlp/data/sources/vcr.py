"""VCR (Zellers et al. 2019, arXiv 1811.10830) as published: `train.jsonl`, `val.jsonl`, `test.jsonl`, and `vcr1images/`
with each picture and its boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.jsonlines import read_json_lines
from fastvlp.data.sources.paths import Images, in_form, pictured, read_json
from fastvlp.errors import UserError

SPLITS = ("train", "val", "test")


def files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for split in SPLITS if (file := path / f"{split}.jsonl").is_file()]


def read(path: Path, images: Images | None = None) -> Iterator[Record | Dropped]:
    """Yields one record an image, keyed by its path, with its questions as multiple choice: answers, and rationales of the
    right one. The boxes of people and things are objects, and a text calls them as people see them: `person 1`."""
    for file in files(path):
        root = images or file.parent / "vcr1images"
        by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
        boxes: dict[str, tuple[str, list[str]]] = {}
        with in_form(file, "VCR"):
            for row in read_json_lines(file):
                by_image[row["img_fn"]].append(_choice(row))
                boxes[row["img_fn"]] = row["metadata_fn"], row["objects"]
        for name, choices in by_image.items():
            key = name.removesuffix(".jpg")
            try:
                info = {"objects": _objects(root, *boxes[name]), "choices": choices, "split": file.stem}
            except UserError as error:
                yield Dropped(key=key, reason=f"its boxes: {error}")
                continue
            yield pictured(key, info, root, name)


def _choice(row: dict[str, Any]) -> dict[str, Any]:
    """What is right of a test row is not told."""
    say = lambda tokens: _text(tokens, row["objects"])  # noqa: E731
    made = {"question": say(row["question"]), "answers": [say(answer) for answer in row["answer_choices"]]}
    if "answer_label" in row:
        made["right"] = row["answer_label"]
    made["rationales"] = [say(rationale) for rationale in row["rationale_choices"]]
    if "rationale_label" in row:
        made["right_rationale"] = row["rationale_label"]
    return {**made, "annot_id": row.get("annot_id")}


def _text(tokens: Sequence[str | list[int]], objects: Sequence[str]) -> str:
    """Words, and lists of objects by number."""
    words = [
        token if isinstance(token, str) else " and ".join(f"{objects[i]} {i + 1}" for i in token) for token in tokens
    ]
    return " ".join(words)


def _objects(root: Images, name: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    if not isinstance(root, Path):
        raise UserError("are in files beside the images, of which there are none")
    path = root / name
    told = read_json(path)
    with in_form(path, "VCR's metadata"):
        return [{"class": kind, "box": list(box[:4])} for kind, box in zip(classes, told["boxes"], strict=True)]
