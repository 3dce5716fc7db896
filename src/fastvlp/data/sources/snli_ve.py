"""SNLI-VE (Xie et al. 2019, arXiv 1901.06706) as published: `snli_ve_train.jsonl`, `snli_ve_dev.jsonl`,
`snli_ve_test.jsonl`, and images of Flickr30k, `{Flickr30K_ID}.jpg`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.schema import LABELS
from fastvlp.data.sources.interface import AnnotationSource, Match
from fastvlp.data.sources.source_files import expect_form, image_record, read_json_lines


@dataclass(frozen=True, kw_only=True)
class SNLIVESource(AnnotationSource):
    """Hypotheses about photographs: entailment, neutral or contradiction."""

    name = "snli_ve"
    summary = "snli_ve_*.jsonl, or one of them"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        return [path] if path.is_file() else sorted(path.glob("snli_ve_*.jsonl"))

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if path.match("snli_ve_*.jsonl") and path.is_file() else super().match(path)

    def records(self, path: Path) -> Iterator[Record | Dropped]:
        """Yields one record an image with all hypotheses about it. Those on which people did not agree are dropped."""
        for file in self.files(path):
            by_image: dict[str, list[dict[str, str]]] = defaultdict(list)
            dropped: list[Dropped] = []
            with expect_form(file, "SNLI-VE"):
                for row in read_json_lines(file):
                    if row["gold_label"] in LABELS:
                        entailment = {"text": row["sentence2"], "label": row["gold_label"]}
                        by_image[str(row["Flickr30K_ID"]).removesuffix(".jpg")].append(entailment)
                    else:
                        key = str(row.get("pairID", row["Flickr30K_ID"]))
                        dropped.append(Dropped(key=key, reason="no gold label"))
            yield from dropped
            for image, entailments in by_image.items():
                info = {"entailments": entailments, "split": file.stem.removeprefix("snli_ve_")}
                yield image_record(image, info, self.image_folder(file.parent), f"{image}.jpg")
