"""The lengths of a split's rows: counted once, by one process, and kept in a file beside the index, which all processes map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from fastvlp.data.batching import Lengths
from fastvlp.data.flat_arrays import DamagedArraysError, FlatArrays, FlatWriter, open_flat
from fastvlp.data.part_file import first_kept
from fastvlp.data.records.interface import SplitRecords
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError
from fastvlp.data.regions import RegionSource, region_count
from fastvlp.data.state_store import say, with_reports
from fastvlp.data.streams import blocks
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError, remedy

# Raised when the same records give other lengths than before.
VERSION = 1
# Records that are counted at a time.
_ROWS = 4096
# More records take a while.
_MANY = 200_000
# Numbers that are checked at a time.
_BLOCK = 1 << 20


def caption_lengths(
    shards: SplitRecords, tokenizer: Tokenizer, field: str, max_length: int, regions: RegionSource | None = None
) -> Lengths:
    """The lengths of a `PairMaker`'s rows, mapped from their file. The first process that asks reads every record's info and
    tokenises every caption; the others wait for it.

    Args:
        field: the field of `info` that holds a record's captions.
        max_length: tokens of a text, `<s>` and `</s>` included.
        regions: which regions come along with a text; each counts as one token.

    Raises UserError if there is no room for the file.
    """
    about = {
        "version": VERSION,
        "index": shards.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "library": tokenizers.__version__,
        "captions": field,
        "max_length": max_length,
        "regions": None if regions is None else json.loads(json.dumps(asdict(regions))),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    paths = shards.places(f"lengths-{digest[:16]}.safetensors")

    def read(path: Path, check: bool) -> Lengths | None:
        with suppress(OSError, DamagedArraysError):
            flat = open_flat(path, check=check)
            return _as_lengths(flat, len(shards)) if about.items() <= flat.about.items() else None
        return None

    def write(file: int, path: Path) -> None:
        parts = with_progress(shards, path, counted_rows(shards, tokenizer, field, max_length, regions))
        write_lengths(file, path.parent, parts, about, len(shards))

    try:
        return first_kept(paths, read, write)[0]
    except OSError as error:
        advice = remedy(error, "free space")
        raise UserError(f"{shards.url}: the lengths of its captions cannot be kept ({error}); {advice}") from error


def with_progress(
    shards: SplitRecords, path: Path, parts: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The parts of many records, with a line that says what takes so long, and how much is left."""
    if len(shards) < _MANY:
        return parts
    say(f"{shards.url}: counting the tokens of {len(shards)} records once; they are kept in {path}")
    return with_reports(parts, -(-len(shards) // _ROWS), f"blocks of {_ROWS} records")


def write_lengths(
    file: int, folder: Path, parts: Iterator[tuple[np.ndarray, np.ndarray]], about: Mapping[str, Any], records: int
) -> None:
    """Writes the lengths of a split into an open file. Raises OSError if the disk is full.

    Args:
        folder: of its parts while they grow.
        parts: for the records in their order, the lengths of their rows, and how many of these each record has.
        records: their number.
    """
    # More texts than 4 bytes can count need 64 for each of these records.
    types = {"tokens": "<u4", "first": "<u4" if records < 2**26 else "<i8"}
    total = 0
    with closing(FlatWriter(types, folder)) as writer:
        writer.add("first", [0])
        for tokens, texts in parts:
            writer.add("tokens", tokens)
            writer.add("first", total + np.cumsum(texts))
            total += len(tokens)
        writer.save(file, about)


def counted_rows(
    shards: SplitRecords, tokenizer: Tokenizer, field: str, max_length: int, regions: RegionSource | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Counts the lengths of the rows of all records, in order, and the number of rows of each record."""
    for part in blocks(len(shards), _ROWS):
        texts: list[str] = []
        counts, others = [], []
        for i in range(part.start, part.stop):
            info: dict[str, Any] = {}
            with suppress(RecordError):
                info = shards.info(i)
            # A record without captions counts as an empty one; making its batch raises the error.
            captions = usable_captions(info, field) or [""]
            texts += captions
            counts.append(len(captions))
            others.append(region_count(regions, info))
        yield tokenizer.lengths(texts, max_length).numpy() + np.repeat(others, counts), np.array(counts)


def _as_lengths(flat: FlatArrays, records: int) -> Lengths:
    """Raises DamagedArraysError if they are not of so many records. The checksum shows damage; this shows intent."""
    tokens, first = flat.arrays.get("tokens"), flat.arrays.get("first")
    if tokens is None or first is None or len(first) != records + 1 or first[0] != 0 or first[-1] != len(tokens):
        raise DamagedArraysError("its arrays have other sizes")
    for part in blocks(records, _BLOCK):
        starts = first[part.start : part.stop + 1]
        if not (starts[1:] > starts[:-1]).all():
            raise DamagedArraysError("a record has no row")
    for part in blocks(len(tokens), _BLOCK):
        if not 0 < tokens[part].min() <= tokens[part].max() < 2**31:
            raise DamagedArraysError("a row has no length")
    return Lengths(tokens, first)
