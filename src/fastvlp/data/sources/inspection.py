"""Inspects a folder of shards: counts, sizes, lengths, fields, and the name of every record that cannot be read."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastvlp.batch import Dropped
from fastvlp.data.blind import AnsweredQuestion, BlindScore, answered_questions, blind_score
from fastvlp.data.caption_cut import CaptionCut
from fastvlp.data.reader import RecordReader, RecordView
from fastvlp.data.records.decode import open_image
from fastvlp.data.records.schema import fault
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.regions import RegionSource
from fastvlp.data.sources.contact_sheet import COLUMNS, ROWS, contact_sheet, summary_text
from fastvlp.data.sources.duplicates import Duplicate, ImageHashes
from fastvlp.data.sources.importing import CHECK
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.files import write_whole

MOST_DUPLICATES = 20
# Fields of texts, in any language, and the name of the text in their entries; None if an entry is the text.
TEXTS = {"captions": None, "questions": "question", "statements": "text"}
# All stored regions are read. A run may read fewer of them, but a record with no visible region is useless for every run.
ALL = RegionSource(stored=True, least=1 << 30, most=1 << 30)


@dataclass(kw_only=True)
class SplitReport:
    """Counts of one split.

    Attributes:
        name: name of the split's folder.
        records: number of readable records.
        images: number of images of these records.
        fields: number of records with each field.
        sizes: number of images of each (width, height) in pixels.
        formats: number of images of each format and mode, such as `JPEG RGB`.
        lengths: the length of every text, by field and unit.
        unreadable: records that cannot be read, with the reason.
        cut: the number of captions and tokens that `max_length` cuts; None without a tokenizer.
        questions: the questions with answers, by field.
        blind: how often the text of the questions alone gives the answer, by field; measured only if there is a training split
            beside this one.
    """

    name: str
    records: int = 0
    images: int = 0
    fields: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    lengths: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    unreadable: list[Dropped] = field(default_factory=list)
    cut: CaptionCut | None = None
    questions: dict[str, list[AnsweredQuestion]] = field(default_factory=dict)
    blind: dict[str, BlindScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of an inspection.

    Attributes:
        splits: a report of each split.
        sheet: path of the contact sheet; None if no record can be read, or if the folder of the data is not writable.
        no_sheet: why it could not be written; empty if it was.
        duplicates: images that are in several splits.
        perceptual: whether images that only look equal were searched for too, which needs the package `imagehash`.
    """

    splits: list[SplitReport]
    sheet: Path | None
    duplicates: list[Duplicate] = field(default_factory=list)
    perceptual: bool = False
    no_sheet: str = ""


def inspect_data(
    folder: Path,
    /,
    *,
    sheet: Path | None = None,
    tokenizer: Path | None = None,
    max_length: int = 50,
    progress: bool = True,
) -> Inspection:
    """Count the records, images and texts in a folder of shards, list every record that cannot be read, and draw a contact
    sheet.

    This reads every record and decodes every image. It also lists images that are in several splits.

    Args:
        folder: A split, or a folder of splits.
        sheet: PNG file for the contact sheet, which shows 24 records from all splits; by default contact-sheet.png in the
            folder.
        tokenizer: A tokenizer.json, to count tokens, and the captions that `max_length` cuts.
        max_length: Largest number of tokens of a text in training, including `<s>` and `</s>`.
        progress: Show a progress bar if stderr is a terminal.

    Raises:
        UserError: There are no shards, or the file that `sheet` names cannot be written.
    """
    folder, counter = Path(folder), Tokenizer.load(tokenizer) if tokenizer else None
    splits = sorted(sub for sub in folder.iterdir() if any(sub.glob("*.tar"))) if folder.is_dir() else []
    reports, pictures, hashes = [], [], ImageHashes()
    for split in splits or [folder]:
        shards = Shards(split)
        report = SplitReport(name=split.name, unreadable=list(shards.damage))
        wanted = COLUMNS * ROWS // max(1, len(splits))
        chosen = set(random.Random(0).sample(range(len(shards)), min(len(shards), wanted)))
        reader = RecordReader(shards, CHECK, images="all", regions=ALL)
        check = partial(_check, hashes=hashes if len(splits) > 1 else None)
        records = in_threads(check, map(reader.record, range(len(shards))))
        for i, checked in enumerate(with_progress(records, shards.__len__, split.name, progress)):
            if isinstance(checked, Dropped):
                report.unreadable.append(checked)
                continue
            record, own = checked
            hashes.add(split.name, record.key, own)
            _count(report, record, counter)
            if i in chosen:
                images = [open_image(data) for data in record.encoded]
                pictures.append((images, summary_text(record.info)))
        if counter is not None:
            report.cut = _cut(report, max_length)
        reports.append(report)
    _answer_blindly(reports)
    drawn, no_sheet = _draw_sheet(sheet, folder, pictures)
    return Inspection(
        splits=reports,
        sheet=drawn,
        duplicates=hashes.across_splits(),
        perceptual=hashes.perceptual,
        no_sheet=no_sheet,
    )


def _answer_blindly(reports: Sequence[SplitReport]) -> None:
    """Adds how often the text of a question alone gives the answer, according to the questions of the split train."""
    train = next((report.questions for report in reports if report.name == "train"), {})
    for report in reports:
        for name, questions in report.questions.items() if report.name != "train" else ():
            if (score := blind_score(train.get(name, []), questions)) is not None:
                report.blind[name] = score


def _cut(report: SplitReport, max_length: int) -> CaptionCut:
    cut = CaptionCut(max_length=max_length)
    for (name, unit), numbers in report.lengths.items():
        if unit == "tokens" and name.startswith("captions"):
            cut.add_lengths(numbers)
    return cut


def _draw_sheet(
    sheet: Path | None, folder: Path, pictures: Sequence[tuple[Sequence[Image.Image], str]]
) -> tuple[Path | None, str]:
    """Draws the contact sheet. Returns its path, or the reason why it could not be written: shared data are often read-only."""
    if not pictures:
        return None, ""
    file, path = io.BytesIO(), sheet or folder / "contact-sheet.png"
    contact_sheet(pictures).save(file, "PNG")
    try:
        write_whole(path, file.getvalue())
    except UserError as error:
        if sheet is not None:
            raise
        return None, str(error)
    return path, ""


def _check(record: RecordView, hashes: ImageHashes | None) -> tuple[RecordView, list[Any]] | Dropped:
    """Reads every part of a record. Returns the record and the hashes of its images."""
    try:
        _ = record.images
        if wrong := fault(record.info):
            raise RecordError(record.key, wrong)
        if record.detected or "confidences" in record.info:
            _ = record.regions
    except RecordError as error:
        return error.dropped
    return record, [] if hashes is None else [hashes.hashes(data) for data in record.encoded]


def _count(report: SplitReport, record: RecordView, tokenizer: Tokenizer | None) -> None:
    report.records += 1
    report.images += len(record.encoded)
    report.fields.update(record.info.keys())
    for data in record.encoded:
        with open_image(data) as image:
            report.sizes[image.size] += 1
            report.formats[f"{image.format} {image.mode}"] += 1
    for name, entries in record.info.items():
        base, _, language = name.partition("_")
        if base not in TEXTS or not isinstance(entries, list):
            continue
        if base == "questions" and (answered := list(answered_questions(entries))):
            report.questions.setdefault(name, []).extend(answered)
        values = [entry.get(TEXTS[base]) if isinstance(entry, dict) else entry for entry in entries]
        texts = [text for text in values if isinstance(text, str)]
        units = {"characters": [len(text) for text in texts]}
        if language != "zh":  # written without spaces
            units["words"] = [len(text.split()) for text in texts]
        if tokenizer is not None and texts:
            _, length = tokenizer.encode(texts, max_length=1 << 16)
            units["tokens"] = length.tolist()
        for unit, numbers in units.items():
            report.lengths.setdefault((name, unit), []).extend(numbers)


def as_tables(reports: list[SplitReport], duplicates: Sequence[Duplicate] = ()) -> Group:
    """Returns the reports as tables for a terminal."""
    cuts = [Text(f"{r.name}: {r.cut}") for r in reports if r.cut is not None]
    tables = (_counts(reports), _distributions(reports), _fields(reports), *_blind(reports), *_unreadable(reports))
    return Group(*tables, *_duplicates(duplicates), *cuts)


def _duplicates(duplicates: Sequence[Duplicate]) -> Iterable[Table | Text]:
    if duplicates:
        exact = sum(one.exact for one in duplicates)
        table = _table("Images in two splits", "record", "is also", "by")
        for one in duplicates[:MOST_DUPLICATES]:
            table.add_row(Text("/".join(one.second)), Text("/".join(one.first)), "bytes" if one.exact else "looks")
        yield table
        yield Text(f"{exact} of the same bytes, {len(duplicates) - exact} that look the same")


def _counts(reports: list[SplitReport]) -> Table:
    table = _table("Records", "split", "records", "images", "unreadable", "formats of images")
    for r in reports:
        formats = ", ".join(f"{name} {n}" for name, n in r.formats.most_common(4))
        table.add_row(r.name, str(r.records), str(r.images), str(len(r.unreadable)), formats)
    return table


def _distributions(reports: list[SplitReport]) -> Table:
    table = _table("Sizes in pixels, lengths of texts", "of", "count", "least", "5 %", "median", "95 %", "most")
    for r in reports:
        rows = {
            "width": [w for (w, _), n in r.sizes.items() for _ in range(n)],
            "height": [h for (_, h), n in r.sizes.items() for _ in range(n)],
            **{f"{name}, {unit}": numbers for (name, unit), numbers in r.lengths.items()},
        }
        # It has a line of its own, because as a column it would take the width that the other names need.
        table.add_row(Text(r.name, style="bold"))
        for name, numbers in rows.items():
            if numbers:
                marks = np.percentile(numbers, [0, 5, 50, 95, 100])
                table.add_row(name, str(len(numbers)), *(f"{mark:.0f}" for mark in marks))
        table.add_section()
    return table


def _fields(reports: list[SplitReport]) -> Table:
    table = _table("Records with each field", "split", "records with it")
    for r in reports:
        table.add_row(r.name, ", ".join(f"{name} {r.fields[name]}" for name in sorted(r.fields)))
    return table


def _blind(reports: list[SplitReport]) -> Iterable[Table]:
    if any(r.blind for r in reports):
        heads = ("split, field", "questions", "by their text alone", "the most frequent answer")
        table = _table("Questions answered without images, right in per cent", *heads)
        for r in reports:
            for name, score in r.blind.items():
                table.add_row(f"{r.name}, {name}", str(score.questions), f"{score.blind:.1%}", f"{score.chance:.1%}")
        yield table


def _table(title: str, *heads: str) -> Table:
    """Returns a table whose names are folded instead of cut on a narrow terminal."""
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
