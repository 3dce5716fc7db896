"""From a source to shards: reads every record, checks it, and writes a folder of shards for each split."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.decode import ORIENTATION, decode, orientation, read_pixels
from fastvlp.data.records.schema import LISTS_OF_OBJECTS, LISTS_OF_TEXT, fault
from fastvlp.data.records.shards import RecordError, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.sources import find_format, make_source
from fastvlp.data.sources.features import add_regions
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.errors import UserError
from fastvlp.files import write_whole

# Small, so that a JPEG is read whole but only an eighth of its pixels are computed.
CHECK = Transform(size=32, mode="squash")
_SPLIT_NAME = re.compile(r"\w[\w.-]*")


@dataclass(kw_only=True)
class Imported:
    """The result of an import.

    Attributes:
        out: the folder.
        written: number of records of each split.
        dropped: what could not be used, by name, with the reason; `out/dropped.jsonl` has it too.
    """

    out: Path
    written: Counter[str] = field(default_factory=Counter)
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """How many were dropped for each reason."""
        return Counter(drop.reason for drop in self.dropped)


def import_data(
    source: Path,
    /,
    out: Path,
    *,
    format: str = "auto",
    split: str = "train",
    val: float = 0.0,
    test: float = 0.0,
    max_side: int = 0,
    per_shard: int = 1000,
    features: Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Imported:
    """Import what you have into shards. Every image is decoded once; what is broken is dropped and named.

    Args:
        source: What to import, a file or a folder in one of the formats.
        out: Folder to write; each split becomes a folder of shards in it, OUT/SPLIT/00000.tar and so on.
        format: Format of the source; `auto` recognises it by the names of its files.
        split: Split of the records that name none.
        val: Share of that split to hold out as `val`, by a hash of the record's key or group, so that a record stays where it
            is when data is added.
        test: Share of that split to hold out as `test`.
        max_side: Make images with a longer side than this many pixels smaller (JPEG of quality 92); 0 keeps all as they are.
        per_shard: Records in a tar.
        features: A detector's regions in UNITER's layout, a folder of npz files or an LMDB: each record gets those of its
            image's name.
        progress: Show a bar, where stderr is a terminal.
        options: Options of the source's format.

    Raises:
        UserError: where no record is usable, where a split of the source holds shards already, where the disk is full, or
            for an option that the format does not have. Then nothing is written.
    """
    source, out = Path(source), Path(out)
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise UserError(f"`val` {val} and `test` {test} are shares from 0 to 1 that leave something to train on")
    if max_side < 0 or per_shard < 1:
        raise UserError("`max_side` is 0 or a number of pixels, `per_shard` at least 1")
    reader = make_source(find_format(source, format), options)
    items = reader.read(source)
    if features is not None:
        items = add_regions(items, Path(features))
    prepared = in_threads(partial(_prepare, max_side=max_side), items)
    shown = with_progress(prepared, partial(reader.count, source), source.name, progress)
    return _write(source, out, shown, partial(_split, split=split, val=val, test=test), per_shard)


def _write(
    source: Path,
    out: Path,
    items: Iterable[Record | Dropped],
    split_of: Callable[[Record], str],
    per_shard: int,
) -> Imported:
    """Writes the records, and adds to `out/dropped.jsonl`."""
    imported, keys = Imported(out=out), set[str]()
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for item in items:
            if isinstance(item, Dropped):
                imported.dropped.append(item)
                continue
            split = split_of(item)
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(out / split, per_shard))
            writers[split].write(replace(item, key=_unique_key(item.key, keys)))
            imported.written[split] += 1
        if not imported.written:
            first = f" (first: {imported.dropped[0].key})" if imported.dropped else ""
            reasons = "; ".join(f"{count}x {reason}" for reason, count in imported.reasons.most_common(5))
            raise UserError(
                f"{source}: no usable record among {len(imported.dropped)}{first}: {reasons or 'the source is empty'}"
            )
    lines = [json.dumps({"key": d.key, "reason": d.reason}, ensure_ascii=False) + "\n" for d in imported.dropped]
    path = out / "dropped.jsonl"
    write_whole(path, (path.read_bytes() if path.exists() else b"") + "".join(lines).encode())
    return imported


def _unique_key(key: str, taken: set[str]) -> str:
    """A key as a tar can hold it, where it ends at the first dot, made different from all before it."""
    key = re.sub(r"[^\w\-/ ]", "_", key).strip("/ ") or "_"
    unique, n = key, 1
    while unique in taken:
        n += 1
        unique = f"{key}_{n}"
    taken.add(unique)
    return unique


def _split(record: Record, split: str, val: float, test: float) -> str:
    """The split that the record names, or the one that the hash of its group or key falls into."""
    named = record.info.get("split")
    if isinstance(named, str) and named:
        if not _SPLIT_NAME.fullmatch(named):
            raise UserError(f"record {record.key}: its split {named!r} cannot be a folder's name; rename it")
        return named
    if not val and not test:
        return split
    digest = hashlib.blake2b(str(record.info.get("group", record.key)).encode(), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    return "test" if place < test else "val" if place < test + val else split


def _prepare(item: Record | Dropped, max_side: int) -> Record | Dropped:
    """The record as it is stored; Dropped where a field or an image has a fault."""
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
        return Dropped(key=item.key, reason="no caption, question, statement, object or label")
    try:
        decode(item, CHECK)
    except RecordError as error:
        return error.dropped
    if not max_side:
        return replace(item, info=info)
    images, scales = zip(*(shrink(image, max_side) for image in item.images))
    if info.get("objects"):
        # An object of a pair of images says which one it is in.
        scale = [scales[at if (at := o.get("image")) in range(len(scales)) else 0] for o in info["objects"]]
        info["objects"] = [{**o, "box": [x * s for x in o["box"]]} for o, s in zip(info["objects"], scale)]
    return replace(item, images=images, info=info)


def shrink(data: bytes, max_side: int) -> tuple[bytes, float]:
    """The image with its longer side at most `max_side` pixels, and the factor its sides were scaled by.

    An image that is small enough comes back as it is, any other as an RGB JPEG of quality 92. EXIF's orientation is kept, so
    that boxes, which are in the stored pixels, need only be scaled. Raises what the decoders raise.
    """
    with Image.open(io.BytesIO(data)) as image:
        longest = max(image.size)
        turned = orientation(image)
    if longest <= max_side:
        return data, 1.0
    # As a letterbox needs it: at least `max_side` pixels on the longer side.
    pixels = Image.fromarray(read_pixels(data, Transform(size=max_side, mode="letterbox"), upright=False).numpy())
    scale = max_side / max(pixels.size)
    size = (max(2, round(pixels.width * scale)), max(2, round(pixels.height * scale)))
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    file = io.BytesIO()
    pixels.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif if turned != 1 else b"")
    return file.getvalue(), max_side / longest
