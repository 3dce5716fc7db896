"""WebDataset tars: members that share a name up to its first dot are one record (image, .txt, .json)."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.tar_index import split_name
from fastvlp.data.sources.interface import Match, Source
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, kw_only=True)
class WebDatasetSource(Source):
    """A tar, or the tars in a folder."""

    name = "webdataset"
    summary = "a tar, or a folder of tars: image with .txt or .json"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.SUFFIX if _tars(path) else Match.NONE

    def read(self, path: Path) -> Iterator[Record | Dropped]:
        """Yields the records of all tars; the unreadable rest of a damaged tar is one Dropped."""
        for file in [path] if path.is_file() else _tars(path):
            key, members = "", dict[str, bytes]()
            try:
                with tarfile.open(file, "r|*") as tar:
                    for member in tar:
                        if not member.isfile():
                            continue
                        name, suffix = split_name(member.name)
                        if name != key and members:
                            yield _record(key, members)
                            members = {}
                        stream = tar.extractfile(member)
                        key = name
                        members[suffix] = stream.read() if stream else b""
            except (tarfile.TarError, EOFError, OSError) as error:
                # The record that was being read may lack members, so it is dropped with the damage.
                yield Dropped(key=f"{file.name}: after {key or 'its start'}", reason=f"tar is cut or damaged ({error})")
            else:
                if members:
                    yield _record(key, members)


def _tars(path: Path) -> list[Path]:
    """The tar itself, or those directly in a folder, by name."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in files if file.name.endswith(TAR_SUFFIXES)]


def _record(key: str, members: dict[str, bytes]) -> Record | Dropped:
    images = tuple(members[suffix] for suffix in sorted(members, key=_order) if _is_image(suffix))
    if not images:
        return Dropped(key=key, reason=f"no image among its members ({', '.join(sorted(members))})")
    try:
        info: dict[str, Any] = json.loads(members.get("json", b"{}"))
        if not isinstance(info, dict):
            return Dropped(key=key, reason="its .json is not an object")
        captions = [info.pop("caption")] if "caption" in info and "captions" not in info else []
        if "txt" in members:
            captions = [members["txt"].decode("utf-8")]
    except UnicodeDecodeError:
        return Dropped(key=key, reason="its text is not UTF-8")
    except ValueError:
        return Dropped(key=key, reason="its .json is not JSON")
    return Record(key=key, images=images, info={**info, "captions": captions} if captions else info)


def _is_image(suffix: str) -> bool:
    """Whether a member's suffix is that of an image: `jpg`, or `1.jpg` for a second image."""
    position, dot, extension = suffix.rpartition(".")
    return "." + extension in IMAGE_SUFFIXES and (not dot or position.isdecimal())


def _order(suffix: str) -> tuple[int, str]:
    """`jpg` before `1.jpg` before `2.jpg`."""
    position = suffix.partition(".")[0]
    return (int(position) if position.isdecimal() else 0, suffix)
