"""The file that holds the index of a split: made once, by the import or by the first process that reads the split.

It is beside the tars, or in the user's cache where these are at a URL or in a folder that cannot be written to.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvlp.data.flat_arrays import DamagedArraysError
from fastvlp.data.part_file import first_kept
from fastvlp.data.records.remote import attempt
from fastvlp.data.records.split_index import SplitIndex, Tar, read_split_index, write_split_index
from fastvlp.data.records.tar_index import TarIndex, scan
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.errors import UserError, remedy

NAME = "index.safetensors"
# Tars without an index of which reading the headers takes a while.
_MANY = 50

Read = Callable[[str, int, int], bytes]


def index_name(root: str) -> str:
    """Returns the path of the index of a folder, or of a single tar."""
    return f"{root.removesuffix('.tar')}.{NAME}" if root.endswith(".tar") else f"{root.rstrip('/')}/{NAME}"


def cached_index(url: str) -> Path:
    """Returns the path, on this machine, of an index that cannot be kept beside its shards: in the folder that the
    environment variable FASTVLP_CACHE names, by default ~/.cache/fastvlp."""
    folder = os.environ.get("FASTVLP_CACHE") or Path.home() / ".cache" / "fastvlp"
    return Path(folder) / f"{sha256(url.encode()).hexdigest()[:32]}.{NAME}"


def index_places(root: str) -> list[Path]:
    """Returns the paths at which the index of local tars may be kept, best first."""
    return [Path(index_name(root)), cached_index(str(Path(root).resolve()))]


def beside_index(index: Path, name: str) -> Path:
    """Returns the path of another file about the same tars."""
    return index.with_name(index.name.removesuffix(NAME) + name)


def local_index(root: str, tars: Sequence[Tar], read: Read) -> tuple[SplitIndex, Path | None]:
    """The index of local tars and its file; None if it is in no file, because nothing can be written."""
    places = index_places(root)
    # One tar of a folder may be in the folder's index.
    older = [*places, *([Path(root).parent / NAME] if Path(root).is_file() else [])]

    def indexes() -> Iterator[tuple[int, TarIndex]]:
        known = _known(older, lambda tar: (tar.name, tar.size, tar.mtime_ns))
        missing = sum((tar.name, tar.size, tar.mtime_ns) not in known for tar in tars)
        for tar in with_progress(tars, lambda: len(tars), "indexing tars", missing > _MANY):
            index, t = known.get((tar.name, tar.size, tar.mtime_ns), (None, 0))
            yield tar.mtime_ns or 0, _scan_local(tar) if index is None else index.tar(t)

    return _open(root, places, tars, indexes, read, "")


def remote_index(
    url: str, fs: Any, root: str, tars: Sequence[Tar], versions: str, read: Read
) -> tuple[SplitIndex, Path | None]:
    """The same of tars at a URL, where nothing is written. `versions`: a hash of what is known of theirs."""
    place = cached_index(url)

    def indexes() -> Iterator[tuple[int, TarIndex]]:
        with tempfile.TemporaryDirectory() as folder:
            # One tar of a folder may be in the folder's index.
            older = [index_name(root), *([index_name(root.rpartition("/")[0])] if root.endswith(".tar") else [])]
            copies = [Path(folder) / str(n) for n in range(len(older))]
            for copy, there in zip(copies, older):
                attempt(there, partial(_download, fs, there, copy))
            known = _known(copies, lambda tar: (tar.name, tar.size))

            def index_of(tar: Tar) -> tuple[int, TarIndex]:
                index, t = known.get((tar.name, tar.size), (None, 0))
                if index is not None:
                    return int(index.tar_mtime_ns[t]), index.tar(t)
                return 0, attempt(tar.place, lambda: _scan_remote(fs, tar))

            missing = sum((tar.name, tar.size) not in known for tar in tars)
            yield from with_progress(in_threads(index_of, tars), lambda: len(tars), "indexing tars", missing > _MANY)

    return _open(url, [place], tars, indexes, read, versions)


def _open(
    place: str,
    paths: Sequence[Path],
    tars: Sequence[Tar],
    indexes: Callable[[], Iterator[tuple[int, TarIndex]]],
    read: Read,
    origin: str,
) -> tuple[SplitIndex, Path | None]:
    """The index in the first of these files that has it; otherwise it is made, in the first that can be written."""

    def existing(path: Path, check: bool) -> SplitIndex | None:
        with suppress(OSError, DamagedArraysError):
            index = read_split_index(path, check=check)
            return index if index.is_of(tars) and index.origin == origin else None
        return None

    def write(file: int, path: Path) -> None:
        write_split_index(file, path.parent, tars, indexes(), read, origin)

    try:
        return first_kept(paths, existing, write)
    except OSError as error:
        folder = tempfile.gettempdir()
        advice = remedy(error, "free space in it")
        raise UserError(f"{place}: the index of its tars cannot be kept in {folder} ({error}); {advice}") from error


def _known(paths: Sequence[Path], name: Callable[[Tar], Any]) -> Mapping[Any, tuple[SplitIndex, int]]:
    """The tars of older indexes, by what they are recognised by: the index, and the number of the tar in it."""
    known: dict[Any, tuple[SplitIndex, int]] = {}
    for path in paths:
        with suppress(OSError, DamagedArraysError):
            index = read_split_index(path)
            for t, tar in enumerate(zip(index.names, index.tar_size.tolist(), index.tar_mtime_ns.tolist())):
                known.setdefault(name(Tar(*tar)), (index, t))
    return known


def _scan_local(tar: Tar) -> TarIndex:
    try:
        with Path(tar.place).open("rb") as file:
            return scan(file, tar.place, tar.size)
    except OSError as error:
        advice = remedy(error, "check the path and its permissions")
        raise UserError(f"{tar.place}: cannot read ({error.strerror or error}); {advice}") from error


def _scan_remote(fs: Any, tar: Tar) -> TarIndex:
    with fs.open(tar.place, "rb") as file:
        return scan(file, tar.place, tar.size)


def _download(fs: Any, place: str, to: Path) -> None:
    if fs.exists(place):
        fs.get_file(place, str(to))
