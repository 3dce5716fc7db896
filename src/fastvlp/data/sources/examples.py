"""A folder with `examples.jsonl`, one JSON object an image, and `images.zip`, whose members they name as `file`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.jsonlines import read_json_lines
from fastvlp.data.sources.nlvr import BOX_ORDERS, statement_info
from fastvlp.errors import UserError

# Where an image lay and how large it was no longer holds in a shard.
STALE = ("file", "width", "height")


def read(path: Path) -> Iterator[Record | Dropped]:
    """Yields one record an image.

    `qa` becomes `questions`, and those with choices `choices` too; `boxes` becomes `objects`; a row whose label is true or
    false is a statement (NLVR: six images, six records) or, when it comes with a `program` (SHAPES), a question to be
    answered yes or no. All other fields travel along.
    """
    try:
        archive = zipfile.ZipFile(path / "images.zip")
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path / 'images.zip'}: cannot be read as a zip ({error})") from None
    with archive:
        for number, row in enumerate(read_json_lines(path / "examples.jsonl"), 1):
            key = str(row.get("image", f"row-{number}"))
            for name, k, info in _images(key, row):
                if isinstance(info, Dropped):
                    yield info
                    continue
                image = _member(archive, name, key)
                record_key = key if k is None else f"{key}-{k}"
                yield image if isinstance(image, Dropped) else Record(key=record_key, images=(image,), info=info)


def count(path: Path) -> int:
    """How many items `read` will yield."""
    return sum(len(_images("", row)) for row in read_json_lines(path / "examples.jsonl"))


def _images(key: str, row: dict[str, Any]) -> list[tuple[str, int | None, dict[str, Any] | Dropped]]:
    """(member, permutation, info) of each record that a row makes."""
    try:
        return _parsed(key, row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return [
            ("", None, Dropped(key=key, reason=f"row is not in the format's form ({type(error).__name__}: {error})"))
        ]


def _parsed(key: str, row: dict[str, Any]) -> list[tuple[str, int | None, dict[str, Any] | Dropped]]:
    file, label, captions = row.get("file"), row.get("label"), row.get("captions") or []
    if not isinstance(file, list):
        return [(str(file), None, _info(row))]
    if not captions or not isinstance(label, bool):
        return [("", None, Dropped(key=key, reason="no sentence or no label"))]
    if len(file) != len(BOX_ORDERS):
        return [("", None, Dropped(key=key, reason=f"expected {len(BOX_ORDERS)} images"))]
    kept: dict[str, Any] = {name: row[name] for name in ("label_source", "split", "evals") if name in row}
    return [
        (str(name), k, {**kept, **statement_info(key, k, captions[0], label, row.get("objects"))})
        for k, name in enumerate(file)
    ]


def _info(row: dict[str, Any]) -> dict[str, Any]:
    moved = ("qa", "boxes", "label") if isinstance(row.get("label"), bool) else ("qa", "boxes")
    info = {name: value for name, value in row.items() if name not in (*STALE, *moved) and value is not None}
    if row.get("qa"):
        info["questions"] = [_question(item) for item in row["qa"]]
        if chosen := [_choice(item) for item in row["qa"] if "choices" in item]:
            info["choices"] = chosen
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
    x, y, width, height = item["bbox_xywh"]
    rest = {name: value for name, value in item.items() if name not in ("label", "bbox_xywh")}
    return {"class": item["label"], "box": [x, y, x + width, y + height], **rest}


def _member(archive: zipfile.ZipFile, name: str, key: str) -> bytes | Dropped:
    """A zip's member is read by its exact name into memory and never extracted, so no path can lead outside."""
    try:
        return archive.read(name)
    except KeyError:
        return Dropped(key=key, reason="image is not in images.zip")
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
        return Dropped(key=key, reason=f"image cannot be read from images.zip ({error})")
