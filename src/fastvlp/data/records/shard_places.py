"""Where the tars of a split are, and the index of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlp.data.records.remote import attempt, is_url
from fastvlp.data.records.tar_index import TarIndex, scan
from fastvlp.errors import UserError, remedy
from fastvlp.files import write_whole

# An index takes a few dozen bytes for each member, a tar at least 512: one that is larger by more than this is not read.
_INDEX_MORE = 1 << 20


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
    if root.endswith(".tar") and is_url(root):
        return [root]  # over HTTP, `ls` would read it whole
    try:
        # `ls` of a file returns the file itself.
        return sorted(name for name in fs.ls(root, detail=False) if name.endswith(".tar"))
    except (FileNotFoundError, NotADirectoryError):
        return []


def index_name(tar: str) -> str:
    return tar.removesuffix(".tar") + ".index.json"


def local_index(tar: Path) -> TarIndex:
    """The index beside a tar; made, and written there if that is possible, where it is missing or of another tar."""
    path = Path(index_name(str(tar)))
    try:
        stat = tar.stat()
        plausible = path.exists() and path.stat().st_size <= stat.st_size + _INDEX_MORE
        index = TarIndex.from_json(path.read_bytes()) if plausible else None
        if index is not None and (index.size, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return index
        with tar.open("rb") as file:
            index = scan(file, str(tar), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"{tar}: cannot read ({error.strerror or error}); {remedy(error, 'check the path and its permissions')}"
        ) from error
    try:
        write_whole(path, index.to_json())
    except UserError:
        return index  # the folder is read-only or full: the index is built again next time
    return index


def remote_index(fs: Any, tar: str) -> TarIndex:
    """The same of a tar at a URL, where nothing is written."""

    def read() -> TarIndex:
        size = int(fs.info(tar)["size"])
        path = index_name(tar)
        # Only sizes are compared, because uploading changes the time of a file.
        plausible = fs.exists(path) and int(fs.info(path)["size"]) <= size + _INDEX_MORE
        index = TarIndex.from_json(fs.cat_file(path)) if plausible else None
        if index is not None and index.size == size:
            return index
        with fs.open(tar, "rb") as file:
            return scan(file, tar, size, 0)

    return attempt(tar, read)
