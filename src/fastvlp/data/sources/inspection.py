"""What is in a folder of shards: counts, sizes, lengths, fields, and every record that cannot be read, by name."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastvlp.batch import Dropped
from fastvlp.data.reader import RecordReader, RecordView
from fastvlp.data.records.schema import fault
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.regions import RegionSource
from fastvlp.data.sources.contact_sheet import COLUMNS, ROWS, contact_sheet, text_of
from fastvlp.data.sources.importing import CHECK
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.data.tokenize import Tokenizer
from fastvlp.files import write_whole

# Field, with any language's suffix: its text's name.
TEXTS = {"captions": None, "questions": "question", "statements": "text"}
# A run may read fewer of a record's stored regions; one that shows none even so is of no use to any.
ALL = RegionSource(stored=True, least=1 << 30, most=1 << 30)


@dataclass(kw_only=True)
class SplitReport:
    """One split. `sizes` counts (width, height) in pixels; `lengths` holds every text's, by field and unit."""

    name: str
    records: int = 0
    images: int = 0
    fields: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    unreadable: list[Dropped] = field(default_factory=list)


def inspect(
    folder: Path, *, tokenizer: Tokenizer | None = None, sheet: Path | None = None, show: bool = False
) -> list[SplitReport]:
    """Reads every record of every split under `folder` (or of the one split it is) and decodes every image.

    Writes a contact sheet of 24 records, drawn evenly over the splits, to `sheet`. Raises UserError where there are no
    shards.
    """
    splits = sorted(sub for sub in folder.iterdir() if any(sub.glob("*.tar"))) if folder.is_dir() else []
    reports, pictures = [], []
    for split in splits or [folder]:
        shards = Shards(split)
        report = SplitReport(name=split.name, unreadable=list(shards.damage))
        wanted = COLUMNS * ROWS // max(1, len(splits))
        chosen = set(random.Random(0).sample(range(len(shards)), min(len(shards), wanted)))

        reader = RecordReader(shards, CHECK, images="all", regions=ALL)
        items = in_threads(_check, map(reader.record, range(len(shards))))
        for i, item in enumerate(with_progress(items, shards.__len__, split.name, show)):
            if isinstance(item, Dropped):
                report.unreadable.append(item)
                continue
            _count(report, item, tokenizer)
            if i in chosen:
                pictures.append(([Image.open(io.BytesIO(data)) for data in item.encoded], text_of(item.info)))
        reports.append(report)
    if sheet is not None and pictures:
        file = io.BytesIO()
        contact_sheet(pictures).save(file, "PNG")
        write_whole(sheet, file.getvalue())
    return reports


def _check(record: RecordView) -> RecordView | Dropped:
    """The record, all of it read once."""
    try:
        _ = record.images
        if wrong := fault(record.info):
            raise RecordError(record.key, wrong)
        if record.detected or "confidences" in record.info:
            _ = record.regions
    except RecordError as error:
        return error.dropped
    return record


def _count(report: SplitReport, record: RecordView, tokenizer: Tokenizer | None) -> None:
    report.records += 1
    report.images += len(record.encoded)
    report.fields.update(record.info.keys())
    for data in record.encoded:
        with Image.open(io.BytesIO(data)) as image:
            report.sizes[image.size] += 1
            report.kinds[f"{image.format} {image.mode}"] += 1
    for name, items in record.info.items():
        kind, _, language = name.partition("_")
        if kind not in TEXTS or not isinstance(items, list):
            continue
        told = [item.get(TEXTS[kind]) if isinstance(item, dict) else item for item in items]
        texts = [text for text in told if isinstance(text, str)]
        units = {"characters": [len(text) for text in texts]}
        if language != "zh":  # written without spaces
            units["words"] = [len(text.split()) for text in texts]
        if tokenizer is not None and texts:
            _, length = tokenizer.encode(texts, max_length=1 << 16)
            units["tokens"] = length.tolist()
        for unit, numbers in units.items():
            report.lengths.setdefault((name, unit), []).extend(numbers)


def rendered(reports: list[SplitReport]) -> Group:
    """The reports as tables for a terminal."""
    return Group(_counts(reports), _distributions(reports), _fields(reports), *_unreadable(reports))


def _counts(reports: list[SplitReport]) -> Table:
    table = _table("Records", "split", "records", "images", "unreadable", "kinds of image")
    for r in reports:
        kinds = ", ".join(f"{kind} {n}" for kind, n in r.kinds.most_common(4))
        table.add_row(r.name, str(r.records), str(r.images), str(len(r.unreadable)), kinds)
    return table


def _distributions(reports: list[SplitReport]) -> Table:
    table = _table("Sizes in pixels, lengths of texts", "of", "count", "least", "5 %", "median", "95 %", "most")
    for r in reports:
        rows = {
            "width": [w for (w, _), n in r.sizes.items() for _ in range(n)],
            "height": [h for (_, h), n in r.sizes.items() for _ in range(n)],
            **{f"{name}, {unit}": numbers for (name, unit), numbers in r.lengths.items()},
        }
        # On a line of its own: as a column it would take the width that the other names need.
        table.add_row(Text(r.name, style="bold"))
        for what, numbers in rows.items():
            if numbers:
                marks = np.percentile(numbers, [0, 5, 50, 95, 100])
                table.add_row(what, str(len(numbers)), *(f"{mark:.0f}" for mark in marks))
        table.add_section()
    return table


def _fields(reports: list[SplitReport]) -> Table:
    table = _table("Records with each field", "split", "records with it")
    for r in reports:
        table.add_row(r.name, ", ".join(f"{name} {r.fields[name]}" for name in sorted(r.fields)))
    return table


def _table(title: str, *heads: str) -> Table:
    """A narrow terminal folds names instead of cutting them."""
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _unreadable(reports: list[SplitReport]) -> Iterable[Table]:
    for r in reports:
        if r.unreadable:
            table = _table(f"Unreadable in {r.name}", "record", "reason")
            for drop in r.unreadable:
                table.add_row(Text(drop.key), Text(drop.reason))
            yield table
