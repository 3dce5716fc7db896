"""Sharded records: WebDataset-compatible tars with random access, on a local disk or through fsspec.

A split is a folder of `00000.tar, 00001.tar, ...`. Consecutive members of a tar that share a key are one record:
`{key}.jpg|png|webp` is its image (`{key}.1.jpg` a second image), `{key}.npz` has a detector's regions of the image
(`{key}.1.npz` of the second), `{key}.json` is the info, and `{key}.txt` the caption if the info has none. `index.safetensors`
beside the tars has the positions of all members; it is made again if it is missing, damaged, or belongs to other tars.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.captions import caption_texts, merge_captions
from fastvlp.data.records.held_members import HeldMembers, Place
from fastvlp.data.records.index_files import beside_index, cached_index, index_places, local_index, remote_index
from fastvlp.data.records.remote import FIRST_WAITS, attempt, open_url, read_range
from fastvlp.data.records.shard_places import list_tars, local_tars, remote_tars, where_shards_are
from fastvlp.data.records.split_index import Member, SplitIndex, read_split_index
from fastvlp.errors import UserError, remedy
from fastvlp.files import most_open
from fastvlp.plain_json import parse_json

_MAGIC = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


class RecordError(Exception):
    """A record cannot be used. Training leaves it out and counts it; an evaluation stops with an error."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"

    @property
    def dropped(self) -> Dropped:
        return Dropped(key=self.key, reason=self.reason)


class ShardWriter:
    """Context manager that writes records into `folder/00000.tar, ...`, `per_shard` records in each tar.

    The tars get their final names only when the block ends without an error, so a split is written whole or not at all.
    Writing the same records again gives the same bytes.
    """

    def __init__(self, folder: str | Path, per_shard: int = 1000, *, append: bool = False):
        """`append`: add further tars to an existing split."""
        self.folder = Path(folder)
        self.append = append
        self._first = 0
        self.per_shard = per_shard
        self.count = 0
        self._parts: list[Path] = []
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        with _explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            existing = sorted(self.folder.glob("*.tar"))
            if existing and not self.append:
                remedy = "remove them, choose another split or folder, or set `append` to add to them"
                raise UserError(f"{self.folder}: already holds shards; {remedy}")
            self._first = 1 + max((int(tar.stem) for tar in existing if tar.stem.isdecimal()), default=-1)
            for stale in self.folder.glob("*.tmp"):
                stale.unlink()
        return self

    def write(self, record: Record) -> None:
        """Adds a record. Raises UserError if its key is invalid or already used in the tar, if its info is not JSON, or if
        the disk is full."""
        members = _members(record)
        if self.count % self.per_shard == 0:
            self._next_tar()
        if record.key in self._keys:
            raise UserError(f"{self.folder}: two records are called {record.key}; give each its own key")
        self._keys.add(record.key)
        assert self._tar is not None
        with _explain_write_errors(self._parts[-1]):
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data)
                self._tar.addfile(header, io.BytesIO(data))
        self.count += 1

    def _next_tar(self) -> None:
        self._close_tar()
        part = self.folder / f"{self._first + len(self._parts):05d}.tar.tmp"
        self._parts.append(part)
        self._keys.clear()
        with _explain_write_errors(part):
            self._tar = tarfile.open(part, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (closed in _close_tar)

    def _close_tar(self) -> None:
        if self._tar is not None:
            tar, self._tar = self._tar, None
            with _explain_write_errors(self._parts[-1]):
                tar.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                return
            self._close_tar()
            for part in self._parts:
                with _explain_write_errors(part):
                    part.replace(part.with_suffix(""))
            if self._parts:
                Shards(self.folder)  # makes the index
            self._parts = []
        finally:
            if self._parts:
                self._discard()

    def _discard(self) -> None:
        # Closing writes buffered data, which may fail again if the disk is full.
        with contextlib.suppress(OSError):
            if self._tar is not None and self._tar.fileobj is not None:
                self._tar.fileobj.close()
        for part in self._parts:
            part.unlink(missing_ok=True)
            part.with_suffix("").unlink(missing_ok=True)


class Shards:
    """Random access to the records of one split. Records are numbered through all tars, in the order in which they are stored.

    Args:
        url: a folder of tars, one tar, or an fsspec URL of either.

    Attributes:
        damage: the parts of the tars that cannot be read, each with a name and a reason.

    Raises UserError if there is no tar or no readable record. Picklable, and safe to use after a fork.
    """

    def __init__(self, url: str | Path):
        self.url = str(url)
        fs, root = open_url(self.url)
        self._local = isinstance(fs, LocalFileSystem)
        self._files: dict[str, int] = {}
        self._fs: tuple[int, Any] | None = None
        self._held = HeldMembers()
        waits = () if self._local else FIRST_WAITS
        entries = [] if self._local else attempt(self.url, lambda: list_tars(fs, root), waits)
        tars, versions = (local_tars(root), "") if self._local else remote_tars(fs, entries)
        if not tars:
            advice = attempt(self.url, lambda: where_shards_are(self.url, fs, root), waits)
            raise UserError(f"{self.url}: no shards (*.tar) here; {advice}")
        self._tars = [tar.place for tar in tars]
        self._index: SplitIndex
        self._index, self._index_path = (
            local_index(root, tars, self._read_span)
            if self._local
            else remote_index(self.url, fs, root, tars, versions, self._read_span)
        )
        self._places = index_places(root) if self._local else [cached_index(self.url)]
        self.damage: list[Dropped] = [part for _, part in self._index.damage]
        if len(self) == 0:
            reasons = "; ".join(f"{d.key}: {d.reason}" for d in self.damage[:5])
            raise UserError(
                f"{self.url}: no readable record in {len(self._tars)} tars ({reasons}); import the data again"
            )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def fingerprint(self) -> str:
        """A hash that changes when the tars change: of their names, sizes and modification times, and of the keys and offsets
        in their index. The tars are not read. The times of tars at a URL are left out, because uploading changes them."""
        return self._index.fingerprint

    @property
    def content(self) -> str:
        """A hash of the records in their order: of the keys, sizes and kinds of all members, and of the bytes of a few records.
        It does not depend on where the records are or when they were written."""
        return self._index.content

    @property
    def folder(self) -> Path | None:
        """The local folder of the tars; None if they are at a URL."""
        return Path(self._tars[0]).parent if self._local else None

    def places(self, name: str) -> list[Path]:
        """Returns where a file about these records may be kept, best first: beside the index, or in the user's cache."""
        return [beside_index(index, name) for index in self._places]

    @property
    def keys(self) -> list[str]:
        """The keys of all readable records, in a new list."""
        return self._index.all_keys()

    def key(self, i: int) -> str:
        self._check(i)
        return self._index.key_of(i)

    def place(self, i: int) -> tuple[str, list[Member]]:
        """Returns the tar that contains record i, and the record's members in it."""
        self._check(i)
        t, members = self._index.members(i)
        return self._tars[t], members

    def read(self, i: int) -> Record:
        """Reads record i. Raises RecordError if it has no image, if a text is not UTF-8, or if its info is not JSON."""
        return Record(key=self.key(i), images=self.images(i), info=self.info(i), detected=self.detected(i))

    def images(self, i: int) -> tuple[bytes, ...]:
        """Reads the encoded images of record i. Raises RecordError if it has none."""
        tar, members = self.place(i)
        images = tuple(self._bytes(tar, at, n) for kind, at, n in members if kind == "image")
        if not images:
            raise RecordError(self.key(i), f"no image in {tar}")
        return images

    def image_count(self, i: int) -> int:
        """Counts the images of record i without reading them."""
        return sum(member.kind == "image" for member in self.place(i)[1])

    def detected(self, i: int) -> tuple[bytes, ...]:
        """Reads the npz files with a detector's regions, one for each image; empty if there are none. Reads no images."""
        tar, members = self.place(i)
        return tuple(self._bytes(tar, at, n) for kind, at, n in members if kind == "npz")

    def info(self, i: int) -> dict[str, Any]:
        """Reads the info of record i, but no images. Raises RecordError if a text is not UTF-8 or the info is not JSON."""
        tar, members = self.place(i)
        info: dict[str, Any] = {}
        caption = None
        try:
            for kind, at, n in members:
                if kind == "json":
                    info = _parse(self._bytes(tar, at, n))
                elif kind == "txt":
                    caption = _text(self._bytes(tar, at, n), "txt")
        except ValueError as error:
            raise RecordError(self.key(i), str(error)) from error
        text = caption_texts(caption) if caption else []
        return merge_captions(info, text if "captions" not in info else None) if text or "caption" in info else info

    @property
    def sizes(self) -> list[int]:
        """The number of records in each tar."""
        return self._index.sizes

    @property
    def total_bytes(self) -> int:
        """Bytes of all tars."""
        return int(self._index.tar_size.sum())

    def hold(self, records: Iterable[int]) -> None:
        """Reads whole records ahead, neighbours in one request. Each is kept until it was released as often as held."""
        self._held.add(self._members(records), self._read_span)

    def release(self, records: Iterable[int]) -> None:
        """Releases records that `hold` keeps in memory."""
        self._held.release(self._members(records))

    def _members(self, records: Iterable[int]) -> Iterator[Place]:
        for i in records:
            tar, members = self.place(i)
            yield from (Place(tar, at, n) for _, at, n in members)

    def __iter__(self) -> Iterator[Record]:
        return (self.read(i) for i in range(len(self)))

    def _check(self, i: int) -> None:
        if not 0 <= i < self._index.count:
            raise IndexError(f"record {i} of {len(self)} in {self.url}")

    def _bytes(self, tar: str, offset: int, length: int) -> bytes:
        held = self._held.get(Place(tar, offset, length)) if self._held else None
        return self._read_span(tar, offset, length) if held is None else held

    def _read_span(self, tar: str, offset: int, length: int) -> bytes:
        if not self._local:
            return read_range(self._filesystem(), tar, offset, length)
        try:
            data = self._pread(tar, offset, length)
        except OSError as error:
            advice = remedy(error, "check that the file still exists")
            raise UserError(f"{tar}: cannot read ({error.strerror or error}); {advice}") from error
        if len(data) != length:
            raise UserError(f"{tar}: became shorter while it was in use; run the command again to rebuild its index")
        return data

    def _pread(self, tar: str, offset: int, length: int) -> bytes:
        fd = self._files.get(tar)
        if fd is not None:
            return os.pread(fd, length, offset)
        fd = os.open(tar, os.O_RDONLY)
        # Files in `_files` stay open as long as `self` exists, because another thread may be reading from them.
        if len(self._files) < most_open() and self._files.setdefault(tar, fd) == fd:
            return os.pread(fd, length, offset)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def _filesystem(self) -> Any:
        # Each process opens its own, because the event loop of an fsspec file system does not survive a fork.
        if self._fs is None or self._fs[0] != os.getpid():
            self._fs = (os.getpid(), open_url(self.url)[0])
        return self._fs[1]

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_files": {}, "_fs": None, "_held": HeldMembers()}
        if self._index_path is not None:
            state["_index"] = self.fingerprint
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._index_path is not None:
            index = read_split_index(self._index_path, check=False)
            if index.fingerprint != state["_index"]:
                raise UserError(f"{self.url}: the tars were changed while they were in use; run the command again")
            self._index = index

    def __del__(self) -> None:
        for fd in self.__dict__.get("_files", {}).values():
            os.close(fd)


@contextlib.contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the path and says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}); {remedy(error, 'free space or choose another folder')}, "
            f"then run the same command again"
        ) from error


def _members(record: Record) -> list[tuple[str, bytes]]:
    """Returns the names and contents of the tar members that hold a record."""
    key = record.key
    if not key or "." in key or key.strip("/") != key or any(ord(c) < 32 for c in key):
        raise UserError(f"record key {key!r}: a key must be non-empty, without dots and control characters; rename it")
    try:
        text = json.dumps(record.info, ensure_ascii=False, sort_keys=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"record {key}: its info cannot be stored as JSON ({error}); remove or convert the field"
        ) from error
    parts = [(n, _suffix(data), data) for n, data in enumerate(record.images)]
    parts += [(n, "npz", data) for n, data in enumerate(record.detected)]
    files = [(f"{key}.{n}.{suffix}" if n else f"{key}.{suffix}", data) for n, suffix, data in parts]
    return [*files, (f"{key}.json", text)]


def _suffix(data: bytes) -> str:
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), "img")


def _text(data: bytes, member: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{member} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _parse(data: bytes) -> dict[str, Any]:
    text = _text(data, "json")
    try:
        info = parse_json(text)
    except ValueError as error:
        raise ValueError(f"json cannot be parsed ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"json is a {type(info).__name__}, not an object")
    return info
