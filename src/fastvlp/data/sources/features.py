"""A detector's regions of many images, in the layouts of UNITER (ChenRocks/UNITER): a folder of npz files, or an LMDB of
them. Each has `norm_bb`, `features`, `conf` and `soft_labels`, one row a region."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.detections import Detected, detected, pack, read_npz
from fastvlp.errors import UserError, install


@dataclass(frozen=True)
class Store:
    """names: of the images' entries. read: the arrays of one; raises ValueError where they cannot be read."""

    names: Sequence[str]
    read: Callable[[str], Mapping[str, Any]]


def attached(items: Iterator[Record | Dropped], path: Path) -> Iterator[Record | Dropped]:
    """Records with the regions of their images; one whose regions are missing or broken is dropped by name.

    An entry belongs to an image if its name, less `.npz` and maybe less the set's name before its first underscore, is the
    image's, letters small; numbers may have zeros before them. The image's name is the end of the record's key, with
    `-img0` and `-img1` for a pair (NLVR2), unless the record names entries itself, in a field `features`.
    """
    store = opened(path)
    place = _places(store.names)
    for item in items:
        if isinstance(item, Dropped):
            yield item
            continue
        try:
            parts = [by_confidence(store.read(_entry(place, name))) for name in _names(item)]
        except (ValueError, OSError) as error:
            yield Dropped(key=item.key, reason=f"its regions: {error}")
            continue
        info = {**item.info, "confidences": [confidences for _, confidences in parts]}
        yield replace(item, info=info, detected=tuple(pack(found) for found, _ in parts))


def opened(path: Path) -> Store:
    if (path / "data.mdb").is_file() or path.suffix == ".mdb":
        return _lmdb(path)
    names = sorted(file.name for file in path.glob("*.npz")) if path.is_dir() else []
    if not names:
        raise UserError(f"{path}: neither an LMDB (data.mdb) nor a folder of npz files with a detector's regions")
    return Store(names, lambda name: read_npz((path / name).read_bytes()))


def by_confidence(arrays: Mapping[str, Any]) -> tuple[Detected, list[float]]:
    """Regions by falling confidence, and those confidences; the released extractor leaves images with just 100 of them as
    they were proposed (spec A3.2). Without `conf` their order stands, all with confidence 1."""
    found = detected(arrays)
    conf = np.asarray(arrays.get("conf", np.ones(len(found.box_R4))))
    if conf.shape != (len(found.box_R4),) or conf.dtype.kind not in "fiu" or not np.isfinite(conf).all():
        raise ValueError(f"conf is one finite number a region, {len(found.box_R4)} in all")
    conf = conf.astype(np.float64)
    order = np.argsort(-conf, kind="stable")
    classes = None if found.classes_RC is None else found.classes_RC[order]
    return Detected(found.box_R4[order], found.feature_RF[order], classes), conf[order].round(4).tolist()


def _names(item: Record) -> list[str]:
    told = item.info.get("features")
    if told is not None:
        return [str(name) for name in (told if isinstance(told, list) else [told])]
    stem = PurePosixPath(item.key).name
    return [stem] if len(item.images) == 1 else [f"{stem}-img{k}" for k in range(len(item.images))]


def _places(names: Sequence[str]) -> dict[tuple[str, bool], list[str]]:
    """The entries of each name, whole or less the set's."""
    place: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name in names:
        whole = _plain(name)
        place[whole, True].append(name)
        place[_plain(whole.partition("_")[2]), False].append(name)
    return place


def _entry(place: Mapping[tuple[str, bool], list[str]], name: str) -> str:
    found = place.get((_plain(name), True)) or place.get((_plain(name), False), [])
    if len(found) != 1:
        raise ValueError("several entries of its name" if found else "no entry of its name")
    return found[0]


def _plain(name: str) -> str:
    plain = name.removesuffix(".npz").lower()
    return str(int(plain)) if plain.isdecimal() else plain


def _lmdb(path: Path) -> Store:
    whole = str(path.resolve())
    keys = _value(whole, "__keys__")
    try:
        names = [str(name) for name in json.loads(keys)] if keys is not None else _listed(whole)
    except (ValueError, TypeError):
        raise UserError(f"{path}: its __keys__ are not a JSON list of names; make the LMDB again") from None

    def read(name: str) -> Mapping[str, Any]:
        value = _value(whole, name)
        if value is None:
            raise ValueError("an entry that __keys__ lists and the LMDB lacks")
        return read_npz(value) if value.startswith(b"PK") else read_msgpack(value)

    return Store(names, read)


@lru_cache
def _environment(path: str) -> Any:
    """Opened once for each path: a second time is refused (py-lmdb #412)."""
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


def _value(path: str, name: str) -> bytes | None:
    with _environment(path).begin() as transaction:
        return transaction.get(name.encode())


def _listed(path: str) -> list[str]:
    with _environment(path).begin() as transaction:
        return [key.decode() for key in transaction.cursor().iternext(values=False)]


def read_msgpack(data: bytes) -> Mapping[str, Any]:
    """The arrays of a dict that msgpack-numpy wrote. That package unpickles arrays of objects; here they stay undecoded,
    like all that is no table of floats."""
    import msgpack

    try:
        told = msgpack.unpackb(data, raw=False, object_hook=_array)
    except (msgpack.UnpackException, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not readable as msgpack ({type(error).__name__}: {error})") from None
    if not isinstance(told, dict):
        raise ValueError("a msgpack that is no dict of arrays")
    return told


def _array(told: dict[Any, Any]) -> Any:
    """msgpack-numpy's {nd: True, type: "<f2", shape: [...], data: bytes} to an array; its keys are bytes."""
    fields = {name.decode() if isinstance(name, bytes) else name: value for name, value in told.items()}
    if fields.get("nd") is not True or fields.get("type") not in ("<f2", "<f4", "<f8"):
        return told
    return np.frombuffer(fields["data"], fields["type"]).reshape(fields["shape"])
