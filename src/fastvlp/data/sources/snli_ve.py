"""SNLI-VE (Xie et al. 2019, arXiv 1901.06706) as published: `snli_ve_train.jsonl`, `snli_ve_dev.jsonl`,
`snli_ve_test.jsonl`, and images of Flickr30k, `{Flickr30K_ID}.jpg`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlp.batch import Dropped
from fastvlp.data.records.schema import LABELS
from fastvlp.data.sources.interface import AnnotationSource, Item, Match
from fastvlp.data.sources.source_files import form_fault, image_record, read_json_lines


@dataclass(frozen=True, kw_only=True)
class SNLIVESource(AnnotationSource):
    """Hypotheses about photographs: entailment, neutral or contradiction."""

    name = "snli_ve"
    summary = "a folder with snli_ve_*.jsonl, or one of these files"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        return [path] if path.is_file() else sorted(path.glob("snli_ve_*.jsonl"))

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if path.match("snli_ve_*.jsonl") and path.is_file() else super().match(path)

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record an image with all hypotheses about it. Those on which people did not agree are dropped."""
        for file in self.files(path):
            by_image: dict[str, list[dict[str, str]]] = defaultdict(list)
            for row in read_json_lines(file):
                if isinstance(row, Dropped):
                    yield row
                    continue
                try:
                    image = str(row["Flickr30K_ID"]).removesuffix(".jpg")
                    entailment = {"text": row["sentence2"], "label": row["gold_label"]}
                except KeyError as error:
                    yield Dropped(key=str(row.get("pairID", "row without a pairID")), reason=form_fault(error))
                    continue
                if entailment["label"] in LABELS:
                    by_image[image].append(entailment)
                else:
                    yield Dropped(key=str(row.get("pairID", image)), reason="no gold label")
            for image, entailments in by_image.items():
                info = {"entailments": entailments, "split": file.stem.removeprefix("snli_ve_")}
                yield image_record(image, info, self.image_folder(file.parent), f"{image}.jpg")
