"""WebDataset tars: the members of a tar that share a name are one record (images, captions in a text or JSON, a class)."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.records import tar_members
from fastvlp.data.records.captions import CAPTION_SUFFIXES, caption_texts, merge_captions
from fastvlp.data.records.tar_index import split_names
from fastvlp.data.sources.interface import Item, Match, Note, Source
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES, walk_files
from fastvlp.errors import UserError
from fastvlp.plain_json import parse_json

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Names of the classes, a line each, beside tars whose `.cls` are numbers (CLIP_benchmark).
CLASS_FILES = ("classnames.txt", "classes.txt")
APART = "members of one record lie apart in its tar; sort them by name before you train on the tar itself"


@dataclass
class _Members:
    """The members of one record by suffix."""

    key: str
    last: int
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WebDatasetSource(Source):
    """A tar, or the tars in a folder."""

    name = "webdataset"
    summary = "a tar, or a folder of tars, in which each image has a .txt, .json or .cls"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.SUFFIX if _tars(path) else Match.NONE

    def read(self, path: Path) -> Iterator[Item]:
        """Yields the records of all tars; the unreadable rest of a damaged tar is one Dropped."""
        for file in _tars(path):
            inner = file.relative_to(path).parts[:-1] if path.is_dir() else ()
            split = {"split": inner[0]} if inner else {}
            classes = _class_names(file.parent)
            for item in _read_tar(file, classes):
                yield (replace(item, info={**split, **item.info}) if isinstance(item, Record) else item)


def _tars(path: Path) -> list[Path]:
    """The tar itself, or those in a folder, by name; those in its sub-folders where it has none itself."""
    if path.is_file():
        return [path] if path.name.lower().endswith(TAR_SUFFIXES) else []
    for files in (path.iterdir(), walk_files(path)):
        if tars := sorted(file for file in files if file.name.lower().endswith(TAR_SUFFIXES)):
            return tars
    return []


def _class_names(folder: Path) -> list[str]:
    """The names of the classes, in a file in the folder of a tar or the one above; empty if there is none."""
    for file in (place / name for place in (folder, folder.parent) for name in CLASS_FILES):
        if file.is_file():
            return file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return []


def _read_tar(file: Path, classes: list[str]) -> Iterator[Item]:
    members: list[tarfile.TarInfo] = []
    error: Exception | None = None
    try:
        tar = tarfile.open(file, "r:*", tarinfo=tar_members.CheckedMember)  # noqa: SIM115 (closed below)
    # Given hostile bytes, tarfile and the readers of packed files raise anything.
    except Exception as wrong:
        yield Dropped(key=f"{file.name}: after its start", reason=f"tar is cut or damaged ({wrong})")
        return
    with tar:
        try:
            for member in tar_members.members(tar):
                if member.isfile():
                    members.append(member)
                elif not member.isdir():
                    yield Note(text=f"{file.name}: links and devices in a tar are not read", example=member.name)
        except (tarfile.TarError, EOFError, OSError) as wrong:
            error = wrong
        records, apart = _group(members)
        for number, record in enumerate(records):
            # A cut may have taken members of the last record, which is dropped with the damage.
            if error is not None and number == len(records) - 1:
                break
            if unread := next(filter(None, map(tar_members.fault, record.members.values())), None):
                yield Dropped(key=record.key, reason=unread)
                continue
            try:
                content = {suffix: _content(tar, member) for suffix, member in record.members.items()}
            except Exception as wrong:
                error = wrong
                break
            yield from _record(record.key, content, classes)
        if apart:
            yield Note(text=APART, example=f"{file.name}: {apart}")
    if error is not None:
        last = records[number].key if records else "its start"
        yield Dropped(key=f"{file.name}: after {last}", reason=f"tar is cut or damaged ({error})")


def _group(found: list[tarfile.TarInfo]) -> tuple[list[_Members], str]:
    """The records of a tar in order, and the key of one whose members do not follow each other, where there is any."""
    records: list[_Members] = []
    latest: dict[str, _Members] = {}
    apart = ""
    for number, ((key, suffix), member) in enumerate(zip(split_names([member.name for member in found]), found)):
        record = latest.get(key)
        if record is None or suffix in record.members:
            record = latest[key] = _Members(key, number)
            records.append(record)
        elif record.last != number - 1:
            apart = apart or key
        record.members[suffix] = member
        record.last = number
    return records, apart


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    data = stream.read() if stream else b""
    if len(data) != member.size:
        raise UserError(f"cut in the middle of {member.name}")
    return data


def _record(key: str, members: dict[str, bytes], classes: list[str]) -> Iterator[Item]:
    """The record, and notes of the members that are no part of it."""
    images = [suffix for suffix in sorted(members, key=_order) if _is_image(suffix)]
    named = [suffix for suffix in sorted(members) if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    # Where no image has the record's own name, those with a name of their own are its images (left, right).
    images = images or named
    texts = [suffix for suffix in members if suffix in ("json", "cls", *CAPTION_SUFFIXES)]
    for suffix in sorted(members.keys() - {*images, *texts}):
        yield Note(text=f"members ending in .{suffix} are not read", example=f"{key}.{suffix}")
    file = f"{key}.{images[0]}" if images else ""
    if not images:
        yield Dropped(key=key, reason=f"no image among its members ({', '.join(sorted(members))})")
        return
    try:
        info = _info(members, classes)
    except UnicodeDecodeError:
        yield Dropped(key=key, reason="its text is not UTF-8", file=file)
    except ValueError as error:
        yield Dropped(key=key, reason=str(error), file=file)
    else:
        yield Record(key=key, images=tuple(members[suffix] for suffix in images), info=info, file=file)


def _info(members: dict[str, bytes], classes: list[str]) -> dict[str, Any]:
    """The fields of a record: those of its .json, its captions and its class. Raises ValueError saying what is wrong."""
    info: Any = {}
    if "json" in members:
        text = members["json"].decode("utf-8-sig")
        try:
            info = parse_json(text)
        except json.JSONDecodeError:
            raise ValueError("its .json is not JSON") from None
        if isinstance(info, list | str):
            # A list of captions, or of objects with one each.
            info = {"captions": caption_texts(info)}
        if not isinstance(info, dict):
            raise ValueError("its .json is not an object")
    texts = [
        text for suffix in CAPTION_SUFFIXES for text in caption_texts(members.get(suffix, b"").decode("utf-8-sig"))
    ]
    info = merge_captions(info, texts)
    if "cls" in members:
        label = members["cls"].decode("utf-8-sig").strip()
        number = int(label) if label.isdecimal() else None
        info["label"] = label if number is None else classes[number] if number < len(classes) else number
    return info


def _is_image(suffix: str) -> bool:
    """Whether a member's suffix is that of an image: `jpg`, or `1.jpg` for a second image."""
    position, dot, extension = suffix.rpartition(".")
    return (f".{extension}" in IMAGE_SUFFIXES or extension == "img") and (not dot or position.isdecimal())


def _order(suffix: str) -> tuple[int, str]:
    """`jpg` before `1.jpg` before `2.jpg`."""
    position = suffix.partition(".")[0]
    return (int(position) if position.isdecimal() else 0, suffix)
