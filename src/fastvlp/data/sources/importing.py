"""Imports a source into shards: reads every record, checks it, and writes a folder of shards for each split."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.data.caption_cut import CaptionCut
from fastvlp.data.records.decode import ORIENTATION, decode, open_image, orientation, read_pixels
from fastvlp.data.records.remote import at_hand
from fastvlp.data.records.schema import LISTS_OF_OBJECTS, LISTS_OF_TEXT, fault, is_absent, unstorable, usable_captions
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.sources import find_format, make_source, matching_paths
from fastvlp.data.sources.features import add_regions
from fastvlp.data.sources.interface import Item, Note, Source
from fastvlp.data.sources.source_files import is_missing
from fastvlp.data.sources.split_names import split_note, usual_split
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.files import write_whole

# A small size, so that a JPEG is read completely but only an eighth of its pixels are computed.
CHECK = Transform(size=32, mode="squash")
_SPLIT_NAME = re.compile(r"\w[\w.-]*")


@dataclass(kw_only=True)
class Imported:
    """The result of an import.

    Attributes:
        out: the folder.
        written: number of records of each split.
        dropped: records that could not be used, each with its name and the reason; `out/dropped.jsonl` lists them too.
        notes: how often each note applied, by its text: something that is not a record was left out or changed.
        examples: the first example of each note.
        cut: the number of captions and tokens that `max_length` cuts; None without a tokenizer.
    """

    out: Path
    written: Counter[str] = field(default_factory=Counter)
    dropped: list[Dropped] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    cut: CaptionCut | None = None

    def add_note(self, note: Note) -> None:
        self.notes[note.text] += 1
        self.examples.setdefault(note.text, note.example)

    @property
    def reasons(self) -> Counter[str]:
        """The number of dropped records for each reason."""
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
    append: bool = False,
    tokenizer: Path | None = None,
    max_length: int = 50,
    progress: bool = True,
    **options: Any,
) -> Imported:
    """Import image-text data into shards. Every image is decoded once; records that cannot be used are left out and listed.

    Args:
        source: File or folder in one of the formats, or a URL of one.
        out: Folder to write. Each split becomes a folder of shards in it: OUT/SPLIT/00000.tar and so on.
        format: Format of the source; `auto` recognises it by the names of its files.
        split: Split of the records that do not name one.
        val: Share of that split to hold out as `val`. A hash of the record's key or group decides, so that records stay in
            their split when data are added.
        test: Share of that split to hold out as `test`.
        max_side: Largest side of an image in pixels. Larger images are made smaller (JPEG of quality 92); 0 keeps all images
            as they are.
        per_shard: Number of records in a tar.
        features: A detector's regions in UNITER's layout: a folder of npz files, or an LMDB. Records and regions are matched
            by the name of the image.
        append: Add further tars to splits that already have shards. Records that they already have are left out.
        tokenizer: A tokenizer.json, to count the captions that `max_length` will cut in training.
        max_length: Largest number of tokens of a text in training, including `<s>` and `</s>`.
        progress: Show a progress bar if stderr is a terminal.
        options: Options of the source's format.

    Raises:
        UserError: No record can be used, a split already has shards, the disk is full, or the format does not have an option.
            Nothing is written then.
    """
    out = Path(out)
    _check_numbers(val, test, max_side, per_shard)
    with at_hand(source, out) as source:
        reader = make_source(find_format(source, format), options)
        paths = matching_paths(source)
        items: Iterator[Item] = chain.from_iterable(_read_on(reader, path) for path in paths)
        if features is not None:
            items = add_regions(items, Path(features))
        prepared = in_threads(partial(_prepare, max_side=max_side), items)
        shown = with_progress(prepared, partial(_count, reader, paths), source.name, progress)
        cut = None if tokenizer is None else CaptionCut(max_length=max_length)
        if tokenizer is not None and cut is not None:
            shown = _counted(shown, cut, Tokenizer.load(tokenizer))
        split_of = partial(_split, split=split, val=val, test=test)
        imported = _write(source, out, shown, split_of, per_shard, append, _images_elsewhere(reader))
        imported.cut = cut
        return imported


def _images_elsewhere(reader: Source) -> str:
    """Returns the advice for missing images; empty for a format that takes no folder of images."""
    has_folder = any(option.name == "images" for option in fields(reader))
    return "if they are in another folder, give it with `images`" if has_folder else ""


def _check_numbers(val: float, test: float, max_side: int, per_shard: int) -> None:
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise UserError(f"`val` {val} and `test` {test} are shares from 0 to 1 that leave something to train on")
    if max_side < 0 or per_shard < 1:
        raise UserError("`max_side` is 0 or a number of pixels, `per_shard` at least 1")


def _read_on(reader: Source, path: Path) -> Iterator[Item]:
    """Yields the items of a path. If the format raises an unexpected error, the rest of the path is dropped, with its name."""
    last = "its start"
    try:
        for item in reader.read(path):
            last = item.key if isinstance(item, Record | Dropped) else last
            yield item
    except UserError:
        raise
    except Exception as error:
        reason = f"the rest cannot be read as {reader.name} ({type(error).__name__}: {str(error)[:80]})"
        yield Dropped(key=f"{path.name}: after {last}", reason=reason)


def _counted(items: Iterable[Item], cut: CaptionCut, tokenizer: Tokenizer) -> Iterator[Item]:
    """Yields the items, after counting their captions."""
    for item in items:
        if isinstance(item, Record):
            cut.add([text for name in LISTS_OF_TEXT for text in usable_captions(item.info, name)], tokenizer)
        yield item


def _count(reader: Source, paths: Sequence[Path]) -> int | None:
    counts = [reader.count(path) for path in paths]
    return None if None in counts else sum(filter(None, counts))


def _write(
    source: Path,
    out: Path,
    items: Iterable[Item],
    split_of: Callable[[Record], str | Dropped],
    per_shard: int,
    append: bool,
    images_elsewhere: str,
) -> Imported:
    """Writes the records, and adds to `out/dropped.jsonl`. `images_elsewhere`: the advice for missing images."""
    imported, keys = Imported(out=out), set[str]()
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        there: dict[str, _StoredRecords] = {}
        for item in items:
            if isinstance(item, Note):
                imported.add_note(item)
                continue
            split = split_of(item) if isinstance(item, Record) else item
            if isinstance(split, Dropped):
                imported.dropped.append(split)
                continue
            assert isinstance(item, Record)
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(out / split, per_shard, append=append))
                if append:
                    there[split] = _StoredRecords(out / split)
                    keys |= there[split].keys
            if split in there and there[split].holds(item):
                imported.dropped.append(Dropped(key=item.key, reason="is in the split already", file=item.file))
                continue
            writers[split].write(replace(item, key=_unique_key(item.key, keys)))
            imported.written[split] += 1
            if note := split_note(item.info.get("split"), split):
                imported.add_note(note)
        if not imported.written and not append:
            first = f" (first: {_shown(imported.dropped[0].key)})" if imported.dropped else ""
            reasons = "; ".join(f"{count}x {reason}" for reason, count in imported.reasons.most_common(5))
            where = f"; {images_elsewhere}" if images_elsewhere and is_missing(imported.dropped[0]) else ""
            raise UserError(
                f"{source}: no usable record among {len(imported.dropped)}{first}: {reasons or 'the source is empty'}{where}"
            )
        if images_elsewhere and (missing := [drop for drop in imported.dropped if is_missing(drop)]):
            for drop in missing:
                imported.add_note(Note(text=f"images are missing; {images_elsewhere}", example=drop.file))
    _add_dropped(out / "dropped.jsonl", imported.dropped)
    return imported


def _add_dropped(path: Path, dropped: Iterable[Dropped]) -> None:
    entries = ({"key": d.key, "reason": d.reason} | ({"file": d.file} if d.file else {}) for d in dropped)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    # A lone surrogate cannot be encoded in UTF-8, so it is written as JSON's escape: \ud83d.
    write_whole(path, (path.read_bytes() if path.exists() else b"") + lines.encode("utf-8", "backslashreplace"))


def _shown(name: str) -> str:
    return name[:80].encode("utf-8", "backslashreplace").decode()


class _StoredRecords:
    """The existing records of a split to which an import appends."""

    def __init__(self, folder: Path):
        self._shards = Shards(folder) if any(folder.glob("*.tar")) else None
        self._place = {} if self._shards is None else {key: i for i, key in enumerate(self._shards.keys)}
        self.keys = self._place.keys()

    def holds(self, record: Record) -> bool:
        """Whether the split already has this record, with the same images and fields."""
        i = self._place.get(_storable_key(record.key))
        if i is None or self._shards is None:
            return False
        same = self._shards.images(i) == record.images
        return same and self._shards.info(i) == json.loads(json.dumps(record.info))


def _storable_key(key: str) -> str:
    """Returns a key that can be stored in a tar, where a key ends at the first dot."""
    return re.sub(r"[^\w\-/ ]", "_", key).strip("/ ") or "_"


def _unique_key(key: str, taken: set[str]) -> str:
    """Returns a key that can be stored in a tar, and that differs from all earlier ones."""
    key = _storable_key(key)
    unique, n = key, 1
    while unique in taken:
        n += 1
        unique = f"{key}_{n}"
    taken.add(unique)
    return unique


def _split(record: Record, split: str, val: float, test: float) -> str | Dropped:
    """Returns the split that the record names, or the one that the hash of its group or key decides; Dropped if the name cannot
    be the name of a folder."""
    named = record.info.get("split")
    if isinstance(named, bool) or not isinstance(named, str | int | None):
        return Dropped(key=record.key, reason=f"split {str(named)[:40]!r} is no name", file=record.file)
    named = "" if named is None else usual_split(str(named))
    if named and not _SPLIT_NAME.fullmatch(named):
        reason = f"split {named[:40]!r} cannot be a folder's name; rename it"
        return Dropped(key=record.key, reason=reason, file=record.file)
    if named or not (val or test):
        return named or split
    group = record.info.get("group", record.key)
    digest = hashlib.blake2b(str(group).encode("utf-8", "replace"), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    return "test" if place < test else "val" if place < test + val else split


def _prepare(item: Item, max_side: int) -> Item:
    """Returns the record as it is stored; Dropped if a field or an image has a fault."""
    if not isinstance(item, Record):
        return item
    try:
        return _checked(item, max_side)
    except RecordError as error:
        return Dropped(key=item.key, reason=error.reason, file=item.file)
    # No content of a record may end an import.
    except Exception as error:
        return Dropped(key=item.key, reason=f"cannot be used ({type(error).__name__}: {error})", file=item.file)


def _checked(item: Record, max_side: int) -> Record:
    """Does the work of `_prepare`. Raises RecordError for a fault, with its description."""
    info = dict(item.info)
    for name in LISTS_OF_TEXT:
        if isinstance(info.get(name), list):
            info[name] = [text.strip() for text in info[name] if isinstance(text, str) and text.strip()]
    if wrong := fault(info) or unstorable(info):
        raise RecordError(item.key, wrong)
    if not any(info.get(name) for name in (*LISTS_OF_TEXT, *LISTS_OF_OBJECTS)) and is_absent(info.get("label")):
        raise RecordError(item.key, "no caption, question, statement, object or label")
    decode(item, CHECK)
    if not max_side:
        return replace(item, info=info)
    images, scales = zip(*(shrink(image, max_side) for image in item.images))
    if info.get("objects"):
        # For a pair of images, each object says which image it is in.
        scale = [scales[at if (at := o.get("image")) in range(len(scales)) else 0] for o in info["objects"]]
        info["objects"] = [{**o, "box": [x * s for x in o["box"]]} for o, s in zip(info["objects"], scale)]
    return replace(item, images=images, info=info)


def shrink(data: bytes, max_side: int) -> tuple[bytes, float]:
    """Returns the image with its longer side at most `max_side` pixels, and the factor by which its sides were scaled.

    An image that is small enough is returned unchanged, any other as an RGB JPEG of quality 92. EXIF's orientation is kept, so
    that boxes, which refer to the stored pixels, need only be scaled. Raises the exceptions of the decoders.
    """
    with open_image(data) as image:
        longest = max(image.size)
        turned = orientation(image)
    if longest <= max_side:
        return data, 1.0
    # A letterbox needs at least `max_side` pixels on the longer side.
    pixels = Image.fromarray(read_pixels(data, Transform(size=max_side, mode="letterbox"), upright=False).numpy())
    scale = max_side / max(pixels.size)
    size = (max(2, round(pixels.width * scale)), max(2, round(pixels.height * scale)))
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    file = io.BytesIO()
    pixels.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif if turned != 1 else b"")
    return file.getvalue(), max_side / longest
