"""From what people have to shards: read a source, check every record, write a folder of shards for each split."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from fastvlp.batch import Dropped, Record
from fastvlp.data import sources
from fastvlp.data.records.decode import decode
from fastvlp.data.records.schema import LISTS_OF_OBJECTS, LISTS_OF_TEXT, fault
from fastvlp.data.records.shards import RecordError, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.sources.shrink import shrink
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.errors import UserError
from fastvlp.files import write_whole

# Small, so that a JPEG is read whole but only an eighth of its pixels are computed.
CHECK = Transform(size=32, mode="squash")
_SPLIT_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """How to import; `split`, `val` and `test` are for sources that do not say which split a record is in.

    split: name of the split.
    val, test: shares of it (0 to 1) to hold out, drawn by a hash of the key, so that they stay the same when data is
        added. Records with the same `group` are never parted.
    max_side: images with a longer side than this many pixels are made smaller (JPEG of quality 92); 0 keeps all.
    per_shard: records in a tar.
    """

    split: str = "train"
    val: float = 0.0
    test: float = 0.0
    max_side: int = 0
    per_shard: int = 1000

    def __post_init__(self) -> None:
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test < 1):
            raise UserError(
                f"--val {self.val} and --test {self.test} are shares from 0 to 1 that leave something to train on"
            )
        if self.max_side < 0 or self.per_shard < 1:
            raise UserError("--max-side is 0 or a number of pixels, --per-shard at least 1")


@dataclass(kw_only=True)
class Imported:
    """What an import wrote and what it dropped."""

    out: Path
    written: Counter[str] = field(default_factory=Counter)
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(drop.reason for drop in self.dropped)


def import_data(source: sources.Source, out: Path, config: ImportConfig, *, show: bool = False) -> Imported:
    """Writes `out/{split}/00000.tar, ...` and adds to `out/dropped.jsonl` the names of what was dropped and why.

    Every image is decoded once, so that what is broken is known before a run. Raises UserError when nothing is left,
    when a split of the source holds shards already, and when the disk is full; then no split is written.
    """
    done, keys = Imported(out=out), set[str]()
    prepared = in_threads(partial(_prepare, max_side=config.max_side), sources.read(source))
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for item in with_progress(prepared, partial(sources.count, source), source.path.name, show):
            if isinstance(item, Dropped):
                done.dropped.append(item)
                continue
            split = _split(item, config)
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(out / split, config.per_shard))
            writers[split].write(replace(item, key=_key(item.key, keys)))
            done.written[split] += 1
        if not done.written:
            first = f" (first: {done.dropped[0].key})" if done.dropped else ""
            raise UserError(
                f"{source.path}: no usable record among {len(done.dropped)}{first}: {_listed(done.reasons)}"
            )
    lines = [json.dumps({"key": d.key, "reason": d.reason}, ensure_ascii=False) + "\n" for d in done.dropped]
    path = out / "dropped.jsonl"
    write_whole(path, (path.read_bytes() if path.exists() else b"") + "".join(lines).encode())
    return done


def _listed(reasons: Counter[str]) -> str:
    return "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common(5)) or "the source is empty"


def _key(key: str, taken: set[str]) -> str:
    """A key as a tar can hold it (its rule: the key ends at the first dot), made different from all before it."""
    key = re.sub(r"[^\w\-/ ]", "_", key).strip("/ ") or "_"
    unique, n = key, 1
    while unique in taken:
        n += 1
        unique = f"{key}_{n}"
    taken.add(unique)
    return unique


def _split(record: Record, config: ImportConfig) -> str:
    named = record.info.get("split")
    if isinstance(named, str) and named:
        if not _SPLIT_NAME.fullmatch(named):
            raise UserError(f"record {record.key}: its split {named!r} cannot be a folder's name; rename it")
        return named
    if not config.val and not config.test:
        return config.split
    digest = hashlib.blake2b(str(record.info.get("group", record.key)).encode(), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    return "test" if place < config.test else "val" if place < config.test + config.val else config.split


def _prepare(item: Record | Dropped, max_side: int) -> Record | Dropped:
    if isinstance(item, Dropped):
        return item
    info = dict(item.info)
    for name in LISTS_OF_TEXT:
        if isinstance(info.get(name), list):
            info[name] = [text.strip() for text in info[name] if isinstance(text, str) and text.strip()]
    wrong = fault(info)
    if wrong:
        return Dropped(key=item.key, reason=wrong)
    if not any(info.get(name) for name in (*LISTS_OF_TEXT, *LISTS_OF_OBJECTS, "label")):
        return Dropped(key=item.key, reason="nothing is said of it: no caption, question, statement, object or label")
    try:
        decode(item, CHECK)
    except RecordError as error:
        return error.dropped
    if not max_side:
        return replace(item, info=info)
    images, scales = zip(*(shrink(image, max_side) for image in item.images))
    if info.get("objects"):
        # Of a pair of images an object says which one it is in.
        scale = [scales[at if (at := o.get("image")) in range(len(scales)) else 0] for o in info["objects"]]
        info["objects"] = [{**o, "box": [x * s for x in o["box"]]} for o, s in zip(info["objects"], scale)]
    return replace(item, images=images, info=info)
