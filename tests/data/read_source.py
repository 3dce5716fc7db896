"""What a source reads, and a picture for it."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources import find_format, make_source
from fastvlp.data.sources.interface import Note


def picture(colour: object = "red", kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(file, kind)
    return file.getvalue()


def read(path: Path, **options: object) -> tuple[dict[str, dict], dict[str, str], list[str]]:
    """Info of each record, reason of each drop, texts of the notes."""
    items = list(make_source(find_format(path), options).read(path))
    infos = {item.key: dict(item.info) for item in items if isinstance(item, Record)}
    dropped = {item.key: item.reason for item in items if isinstance(item, Dropped)}
    return infos, dropped, [item.text for item in items if isinstance(item, Note)]
