"""The locations of the tars of a split."""

from __future__ import annotations

import os
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvlp.data.records.remote import attempt, is_url
from fastvlp.data.records.split_index import Tar
from fastvlp.errors import UserError, remedy

# What file systems call the version of a file.
_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "md5")


def where_shards_are(url: str, fs: Any, root: str) -> str:
    """Returns the advice for a folder without shards: give one of the splits inside it, or make shards."""
    if not is_url(url) and not fs.exists(root):
        return "the folder does not exist: correct its path, or make it with `vlp data import` or `vlp data demo`"
    inside = fs.ls(root, detail=False) if fs.isdir(root) else []
    splits = sorted(Path(place).name for place in inside if fs.isdir(place) and find_tars(fs, place))
    if splits:
        return f"its folders {', '.join(splits)} have some: give one of them, such as {url.rstrip('/')}/{splits[0]}"
    return "make them with `vlp data import` or `vlp data demo`"


def find_tars(fs: Any, root: str) -> list[str]:
    """The tars in a folder, sorted, or the one that `root` is."""
    return [entry["name"] for entry in list_tars(fs, root)]


def list_tars(fs: Any, root: str) -> list[dict[str, Any]]:
    """Lists the tars with the details that a file system gives; for a single tar over HTTP only its name."""
    if root.endswith(".tar") and is_url(root):
        return [{"name": root}]  # over HTTP, `ls` would read it whole
    try:
        # `ls` of a file returns the file itself.
        entries = [entry for entry in fs.ls(root, detail=True) if entry["name"].endswith(".tar")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entries, key=lambda entry: entry["name"])


def local_tars(root: str) -> list[Tar]:
    """The tars of a local split. Raises UserError if the folder cannot be read."""
    try:
        if root.endswith(".tar") and Path(root).is_file():
            status = Path(root).stat()
            return [Tar(root, status.st_size, status.st_mtime_ns)]
        with os.scandir(root) as entries:
            tars = [(entry.path, entry.stat()) for entry in entries if entry.name.endswith(".tar")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        advice = remedy(error, "check the path and its permissions")
        raise UserError(f"{root}: cannot read ({error.strerror or error}); {advice}") from error
    return sorted(Tar(place, status.st_size, status.st_mtime_ns) for place, status in tars)


def remote_tars(fs: Any, entries: list[dict[str, Any]]) -> tuple[list[Tar], str]:
    """The listed tars with their sizes, and a hash of their versions, as far as the file system has any."""
    versions = sha256()
    tars = []
    for entry in entries:
        place = entry["name"]
        known = entry if entry.get("size") is not None else attempt(place, partial(fs.info, place))
        tars.append(Tar(place, int(known["size"]), None))
        versions.update(repr([str(known[name]) for name in _VERSIONS if name in known]).encode())
    return tars, versions.hexdigest()
