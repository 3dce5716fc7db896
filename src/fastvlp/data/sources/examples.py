"""A folder with `examples.jsonl`, one JSON object an image, and `images.zip`, whose members they name as `file`."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import Item, Match, Source
from fastvlp.data.sources.nlvr import BOX_ORDERS, statement_info
from fastvlp.data.sources.source_files import read_json_lines, to_corners
from fastvlp.errors import UserError
from fastvlp.files import MOST_BYTES

ROWS, IMAGES = "examples.jsonl", "images.zip"
# Place and size of an image are others in a shard.
STALE = ("file", "width", "height")


@dataclass(frozen=True, kw_only=True)
class ExamplesSource(Source):
    """Examples of many data sets in one form.

    `qa` becomes `questions`, and those with choices `choices` too; `boxes` becomes `objects`. A row whose label is true or
    false is a statement (NLVR: six images, six records) or, when it comes with a `program` (SHAPES), a question to be
    answered yes or no. All other fields are kept.
    """

    name = "examples"
    summary = f"a folder with {ROWS} and {IMAGES}"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if (path / ROWS).is_file() and (path / IMAGES).is_file() else Match.NONE

    def read(self, path: Path) -> Iterator[Item]:
        """Yields one record an image."""
        try:
            archive = zipfile.ZipFile(path / IMAGES)
        # Given hostile bytes, the reader raises anything from struct.error to OverflowError.
        except Exception as error:
            raise UserError(f"{path / IMAGES}: cannot be read as a zip ({error})") from None
        with archive:
            names = Counter(archive.namelist())
            twice = {name for name, count in names.items() if count > 1}
            for number, row in enumerate(read_json_lines(path / ROWS), 1):
                if isinstance(row, Dropped):
                    yield row
                    continue
                for item in _images(str(row.get("image", f"row-{number}")), row):
                    if isinstance(item, Dropped):
                        yield item
                    elif item.member in twice:
                        yield Dropped(key=item.row, reason=f"{IMAGES} has two members of this name")
                    else:
                        yield _record(archive, item)

    def count(self, path: Path) -> int:
        return sum(1 if isinstance(row, Dropped) else len(_images("", row)) for row in read_json_lines(path / ROWS))


class _Image(NamedTuple):
    """A record before its image is read: key of its row, own key, member of the zip, info."""

    row: str
    key: str
    member: str
    info: dict[str, Any]


def _images(key: str, row: dict[str, Any]) -> list[_Image | Dropped]:
    """The records that a row makes."""
    try:
        file, label, captions = row.get("file"), row.get("label"), row.get("captions") or []
        if not isinstance(file, list):
            return [_Image(key, key, str(file), _info(row))]
        if not captions or not isinstance(label, bool):
            return [Dropped(key=key, reason="no sentence or no label")]
        if len(file) != len(BOX_ORDERS):
            return [Dropped(key=key, reason=f"expected {len(BOX_ORDERS)} images")]
        common = {name: row[name] for name in ("label_source", "split", "evals") if name in row}
        return [
            _Image(
                key, f"{key}-{k}", str(name), common | statement_info(key, k, captions[0], label, row.get("objects"))
            )
            for k, name in enumerate(file)
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return [Dropped(key=key, reason=f"row is not in the format's form ({type(error).__name__}: {error})")]


def _info(row: dict[str, Any]) -> dict[str, Any]:
    converted = ("qa", "boxes", "label") if isinstance(row.get("label"), bool) else ("qa", "boxes")
    info = {name: value for name, value in row.items() if name not in (*STALE, *converted) and value is not None}
    if row.get("qa"):
        info["questions"] = [_question(item) for item in row["qa"]]
        if choices := [_choice(item) for item in row["qa"] if "choices" in item]:
            info["choices"] = choices
    if row.get("boxes"):
        info["objects"] = [_object(item) for item in row["boxes"]]
    if isinstance(row.get("label"), bool):
        texts = info.pop("captions", [])
        if "program" in row:
            answer = "yes" if row["label"] else "no"
            info["questions"] = [{"question": text, "answers": {answer: 1.0}} for text in texts]
        else:
            info["statements"] = [{"text": text, "label": row["label"]} for text in texts]
    return info


def _question(item: dict[str, Any]) -> dict[str, Any]:
    """{q, a} or {q, choices, answer: position}: with choices, the right one is put first and named in `answer`."""
    question = {"question": item["q"], "kind": item["q"].split(" ", 1)[0].strip("?!,.").lower()}
    if "choices" not in item:
        return {**question, "answers": {str(item["a"]): 1.0}}
    choices = list(item["choices"])
    right = choices.pop(item["answer"])
    return {**question, "answers": {right: 1.0}, "answer": right, "choices": [right, *choices]}


def _choice(item: dict[str, Any]) -> dict[str, Any]:
    return {"question": item["q"], "answers": list(item["choices"]), "right": item["answer"]}


def _object(item: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in item.items() if name not in ("label", "bbox_xywh")}
    return {"class": item["label"], "box": to_corners(item["bbox_xywh"]), **rest}


def _record(archive: zipfile.ZipFile, image: _Image) -> Record | Dropped:
    """The record with its image. A member of the zip is read by its exact name into memory and never extracted, so no path can
    lead outside."""
    try:
        member = archive.getinfo(image.member)
    except KeyError:
        return Dropped(key=image.row, reason=f"image is not in {IMAGES}")
    if member.file_size > MOST_BYTES:
        return Dropped(
            key=image.row, reason=f"image in {IMAGES} unfolds to {member.file_size} bytes, too many for a picture"
        )
    try:
        data = archive.read(member)
    except Exception as error:
        return Dropped(key=image.row, reason=f"image cannot be read from {IMAGES} ({error})")
    return Record(key=image.key, images=(data,), info=image.info)
