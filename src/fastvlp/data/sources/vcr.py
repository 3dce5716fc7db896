"""VCR (Zellers et al. 2019, arXiv 1811.10830) as published: `train.jsonl`, `val.jsonl`, `test.jsonl`, and `vcr1images/`
with each image and its boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped
from fastvlp.data.sources.interface import AnnotationSource, Item, Match
from fastvlp.data.sources.source_files import each_row, expect_form, image_record, read_json, read_json_lines
from fastvlp.errors import UserError

SPLITS = ("train", "val", "test")
IMAGES = "vcr1images"


@dataclass(frozen=True, kw_only=True)
class VCRSource(AnnotationSource):
    """Multiple choice about scenes of films: answers, and rationales of the right one."""

    name = "vcr"
    summary = "a folder with VCR's train.jsonl, val.jsonl, test.jsonl and vcr1images/"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        if path.is_file():
            return [path]
        return [file for split in SPLITS if (file := path / f"{split}.jsonl").is_file()]

    @classmethod
    def match(cls, path: Path) -> Match:
        # Other sets have a train.jsonl too.
        return Match.NAMES if (path / IMAGES).is_dir() and cls.files(path) else Match.NONE

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record an image, keyed by its path. The boxes of people and things are objects; a text calls them by
        class and number, as `person 1`."""
        for file in self.files(path):
            root = self.image_folder(file.parent / IMAGES)
            by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
            boxes: dict[str, tuple[str, list[str]]] = {}

            def add(row: dict[str, Any], by_image: Any = by_image, boxes: Any = boxes) -> None:
                name, choice, place = str(row["img_fn"]), _choice(row), (str(row["metadata_fn"]), list(row["objects"]))
                by_image[name].append(choice)
                boxes[name] = place

            yield from each_row(read_json_lines(file), file.name, add)
            for name, choices in by_image.items():
                key = name.removesuffix(".jpg")
                try:
                    info = {"objects": _objects(root, *boxes[name]), "choices": choices, "split": file.stem}
                except UserError as error:
                    yield Dropped(key=key, reason=f"its boxes: {error}")
                    continue
                yield image_record(key, info, root, name)


def _choice(row: dict[str, Any]) -> dict[str, Any]:
    """A question with its answers and rationales. A test row does not say which are right."""

    def text(tokens: Sequence[str | list[int]]) -> str:
        """Words, and lists of objects by number."""
        objects = row["objects"]
        words = [
            token if isinstance(token, str) else " and ".join(f"{objects[i]} {i + 1}" for i in token)
            for token in tokens
        ]
        return " ".join(words)

    choice = {"question": text(row["question"]), "answers": [text(answer) for answer in row["answer_choices"]]}
    if "answer_label" in row:
        choice["right"] = row["answer_label"]
    choice["rationales"] = [text(rationale) for rationale in row["rationale_choices"]]
    if "rationale_label" in row:
        choice["right_rationale"] = row["rationale_label"]
    return {**choice, "annot_id": row.get("annot_id")}


def _objects(root: Path | None, name: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of an image, from the file beside it."""
    if root is None:
        raise UserError("are in files beside the images, of which there are none")
    path = root / name
    content = read_json(path)
    with expect_form(path, "VCR's metadata"):
        return [
            {"class": category, "box": list(box[:4])} for category, box in zip(classes, content["boxes"], strict=True)
        ]
