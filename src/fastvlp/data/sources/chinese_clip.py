"""The layout of Chinese-CLIP (Yang et al. 2022, arXiv 2211.01335): `NAME_imgs.tsv`, an id and an image in base64 a line, and
`NAME_texts.jsonl` with texts and the ids of their images."""

from __future__ import annotations

import base64
import binascii
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.captions import caption_texts
from fastvlp.data.sources.interface import AnnotationSource, Item, Match
from fastvlp.data.sources.source_files import each_row, read_json_lines
from fastvlp.data.sources.split_names import USUAL, usual_split
from fastvlp.errors import UserError

IMAGES, TEXTS = "_imgs.tsv", "_texts.jsonl"


@dataclass(frozen=True, kw_only=True)
class ChineseCLIPSource(AnnotationSource):
    """Images in base64 and texts that name them."""

    name = "chinese_clip"
    summary = "Chinese-CLIP's *_imgs.tsv (base64) and *_texts.jsonl, or their folder"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        if path.is_dir():
            return sorted(path.glob(f"*{IMAGES}"))
        if not path.name.endswith((IMAGES, TEXTS)):
            return []
        return [path.with_name(path.name.removesuffix(TEXTS).removesuffix(IMAGES) + IMAGES)]

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if cls.files(path) else Match.NONE

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record an image, keyed by its id, with its texts as captions."""
        for file in self.files(path):
            name = file.name.removesuffix(IMAGES)
            texts = file.with_name(name + TEXTS)
            missing = [one for one in (file, texts) if not one.is_file()]
            if missing:
                raise UserError(
                    f"{missing[0]}: not here; images are in NAME{IMAGES}, and their texts in NAME{TEXTS} beside it"
                )
            captions: dict[str, list[str]] = defaultdict(list)

            def add(row: dict[str, Any], captions: dict[str, list[str]] = captions) -> None:
                for image in row["image_ids"]:
                    captions[str(image)] += caption_texts(row["text"])

            yield from each_row(read_json_lines(texts), texts.name, add)
            split = {"split": name} if usual_split(name) in USUAL else {}
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    item = _image(f"{file.name}:{number}", line, captions)
                    yield (replace(item, info={**split, **item.info}) if isinstance(item, Record) else item)
            yield from (Dropped(key=image, reason=f"its image is not in {file.name}") for image in captions)


def _image(place: str, line: bytes, captions: dict[str, list[str]]) -> Record | Dropped:
    """The record of a line; its captions are taken out of `captions`."""
    image, tab, data = line.strip().partition(b"\t")
    key = image.decode("utf-8", "replace")[:200]
    if not tab:
        return Dropped(key=place, reason="line is no id and image in base64 with a tab between")
    texts = captions.pop(key, [])
    try:
        # The URL-safe alphabet is usual for these files too.
        decoded = base64.b64decode(data.strip().replace(b"-", b"+").replace(b"_", b"/") + b"==", validate=False)
    except (binascii.Error, ValueError):
        return Dropped(key=key, reason="its image is not base64")
    if not texts:
        return Dropped(key=key, reason="no text names this image")
    return Record(key=key, images=(decoded,), info={"captions": texts})
