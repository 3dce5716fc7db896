"""A detector's regions of many images, in the layouts of UNITER (ChenRocks/UNITER): a folder of npz files, or an LMDB of
them. Each has `norm_bb`, `features`, `conf` and `soft_labels`, one row a region."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.detections import Detections, check_arrays, pack, read_npz
from fastvlp.data.sources.interface import Item
from fastvlp.errors import UserError, install
from fastvlp.files import read_plain
from fastvlp.plain_json import parse_json


@dataclass(frozen=True)
class FeatureStore:
    """An open folder or LMDB.

    Attributes:
        names: names of the entries, one for each image.
        read: the arrays of an entry; raises ValueError if they cannot be read.
    """

    names: Sequence[str]
    read: Callable[[str], Mapping[str, Any]]


def add_regions(items: Iterator[Item], path: Path) -> Iterator[Item]:
    """Yields the records with the regions of their images; a record whose regions are missing or broken is dropped by name.

    An entry belongs to an image if its name is the image's: without `.npz`, in small letters, and with or without the name of
    the data set before its first underscore; leading zeros of a number do not count. The image's name is the end of the
    record's key, with `-img0` and `-img1` for a pair (NLVR2), unless the record names entries itself, in a field `features`.
    """
    store = open_store(path)
    entries = _entries_by_name(store.names)
    for item in items:
        if not isinstance(item, Record):
            yield item
            continue
        try:
            images = [by_confidence(store.read(_entry(entries, name))) for name in _image_names(item)]
        except (ValueError, OSError) as error:
            yield Dropped(key=item.key, reason=f"its regions: {error}", file=item.file)
            continue
        info = {**item.info, "confidences": [confidences for _, confidences in images]}
        yield replace(item, info=info, detected=tuple(pack(regions) for regions, _ in images))


def open_store(path: Path) -> FeatureStore:
    """Raises UserError if there is neither an LMDB nor a folder of npz files."""
    if (path / "data.mdb").is_file() or path.suffix == ".mdb":
        return _open_lmdb(path)
    names = sorted(file.name for file in path.glob("*.npz")) if path.is_dir() else []
    if not names:
        raise UserError(f"{path}: neither an LMDB (data.mdb) nor a folder of npz files with a detector's regions")
    return FeatureStore(names, lambda name: read_npz(read_plain(path / name)))


def by_confidence(arrays: Mapping[str, Any]) -> tuple[Detections, list[float]]:
    """Regions by falling confidence, and those confidences; the released extractor leaves the regions of images with exactly
    100 of them in the order of their proposal. Without `conf` the order is kept, all with confidence 1."""
    regions = check_arrays(arrays)
    conf = np.asarray(arrays.get("conf", np.ones(len(regions.box_R4))))
    if conf.shape != (len(regions.box_R4),) or conf.dtype.kind not in "fiu" or not np.isfinite(conf).all():
        raise ValueError(f"conf is one finite number a region, {len(regions.box_R4)} in all")
    conf = conf.astype(np.float64)
    order = np.argsort(-conf, kind="stable")
    classes = None if regions.classes_RC is None else regions.classes_RC[order]
    return Detections(regions.box_R4[order], regions.feature_RF[order], classes), conf[order].round(4).tolist()


def _image_names(item: Record) -> list[str]:
    """The names by which the entries of a record's images are looked up."""
    names = item.info.get("features")
    if names is not None:
        return [str(name) for name in (names if isinstance(names, list) else [names])]
    stem = PurePosixPath(item.key).name
    return [stem] if len(item.images) == 1 else [f"{stem}-img{k}" for k in range(len(item.images))]


def _entries_by_name(names: Sequence[str]) -> dict[tuple[str, bool], list[str]]:
    """The entries of each name, by (name, True); by (name, False) without the name of the data set."""
    entries: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name in names:
        plain = _plain(name)
        entries[plain, True].append(name)
        entries[_plain(plain.partition("_")[2]), False].append(name)
    return entries


def _entry(entries: Mapping[tuple[str, bool], list[str]], name: str) -> str:
    candidates = entries.get((_plain(name), True)) or entries.get((_plain(name), False), [])
    if len(candidates) != 1:
        raise ValueError("several entries of its name" if candidates else "no entry of its name")
    return candidates[0]


def _plain(name: str) -> str:
    plain = name.removesuffix(".npz").lower()
    return str(int(plain)) if plain.isdecimal() else plain


def _open_lmdb(path: Path) -> FeatureStore:
    place = str(path.resolve())
    keys = _lmdb_value(place, "__keys__")
    try:
        names = [str(name) for name in parse_json(keys)] if keys is not None else _lmdb_keys(place)
    except (ValueError, TypeError):
        raise UserError(f"{path}: its __keys__ are not a JSON list of names; make the LMDB again") from None

    def read(name: str) -> Mapping[str, Any]:
        value = _lmdb_value(place, name)
        if value is None:
            raise ValueError("an entry that __keys__ lists and the LMDB lacks")
        return read_npz(value) if value.startswith(b"PK") else read_msgpack(value)

    return FeatureStore(names, read)


@lru_cache
def _environment(path: str) -> Any:
    """An open LMDB; each is opened once, for a second time is refused (py-lmdb #412)."""
    try:
        import lmdb
        import msgpack  # noqa: F401  (of its entries)
    except ImportError:
        raise UserError(f"{path}: reading an LMDB needs lmdb and msgpack; {install('lmdb')}") from None
    try:
        return lmdb.open(path, subdir=Path(path).is_dir(), readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{path}: cannot be opened as an LMDB ({error})") from None


# An environment does not survive a fork, and counts as open in the child: there it could not even be opened again.
os.register_at_fork(before=_environment.cache_clear)


def _lmdb_value(path: str, name: str) -> bytes | None:
    with _environment(path).begin() as transaction:
        return transaction.get(name.encode())


def _lmdb_keys(path: str) -> list[str]:
    with _environment(path).begin() as transaction:
        return [key.decode() for key in transaction.cursor().iternext(values=False)]


def read_msgpack(data: bytes) -> Mapping[str, Any]:
    """The arrays of a dict that msgpack-numpy wrote. That package unpickles arrays of objects; here they stay undecoded, like
    everything but tables of floats. Raises ValueError if it is no such dict."""
    import msgpack

    try:
        arrays = msgpack.unpackb(data, raw=False, object_hook=_array)
    except (msgpack.UnpackException, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not readable as msgpack ({type(error).__name__}: {error})") from None
    if not isinstance(arrays, dict):
        raise ValueError("a msgpack that is no dict of arrays")
    return arrays


def _array(entry: dict[Any, Any]) -> Any:
    """msgpack-numpy's {nd: True, type: "<f2", shape: [...], data: bytes} as an array; its keys are bytes."""
    fields = {name.decode() if isinstance(name, bytes) else name: value for name, value in entry.items()}
    if fields.get("nd") is not True or fields.get("type") not in ("<f2", "<f4", "<f8"):
        return entry
    return np.frombuffer(fields["data"], fields["type"]).reshape(fields["shape"])
