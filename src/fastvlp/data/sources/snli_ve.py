"""SNLI-VE (Xie et al. 2019, arXiv 1901.06706) as published: `snli_ve_train.jsonl`, `snli_ve_dev.jsonl`,
`snli_ve_test.jsonl`, and images of Flickr30k, `{Flickr30K_ID}.jpg`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.schema import LABELS
from fastvlp.data.sources.jsonlines import read_json_lines
from fastvlp.data.sources.paths import Images, in_form, pictured


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("snli_ve_*.jsonl"))


def read(path: Path, images: Images | None = None) -> Iterator[Record | Dropped]:
    """Yields one record an image with all that is entailed by it or not; what people could not agree on is dropped."""
    for file in files(path):
        by_image: dict[str, list[dict[str, str]]] = defaultdict(list)
        lost: list[Dropped] = []
        with in_form(file, "SNLI-VE"):
            for row in read_json_lines(file):
                if row["gold_label"] in LABELS:
                    told = {"text": row["sentence2"], "label": row["gold_label"]}
                    by_image[str(row["Flickr30K_ID"]).removesuffix(".jpg")].append(told)
                else:
                    lost.append(Dropped(key=str(row.get("pairID", row["Flickr30K_ID"])), reason="no gold label"))
        yield from lost
        for image, entailments in by_image.items():
            info = {"entailments": entailments, "split": file.stem.removeprefix("snli_ve_")}
            yield pictured(image, info, images or file.parent, f"{image}.jpg")
