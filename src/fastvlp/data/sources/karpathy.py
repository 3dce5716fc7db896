"""The splits of COCO, Flickr30k and Flickr8k that captioning and retrieval are measured on (Karpathy and Li 2015, arXiv
1412.2306): `dataset_coco.json`, `dataset_flickr30k.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlp.data.sources.interface import AnnotationSource, Item, Match
from fastvlp.data.sources.source_files import each_row, expect_form, image_record, read_json
from fastvlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class KarpathySource(AnnotationSource):
    """Captions in Karpathy's splits."""

    name = "karpathy"
    summary = "dataset_coco.json, dataset_flickr30k.json"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        return [path] if path.is_file() else sorted(filter(_is_own, path.glob("dataset_*.json")))

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if path.match("dataset_*.json") and path.is_file() and _is_own(path) else super().match(path)

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record an image. `restval`, COCO's validation images that are in no test, are trained on. An image is in
        the folder that its `filepath` names, if it names one."""
        for file in self.files(path):
            content = read_json(file)
            rows: list[tuple[str, dict[str, Any]]] = []
            with expect_form(file, "Karpathy's splits"):
                images = list(content["images"])

            def add(row: dict[str, Any], rows: Any = rows) -> None:
                rows.append(_image(row))

            yield from each_row(images, f"{file.name}: image", add)
            if images and not rows:
                raise UserError(
                    f"{file}: not in the format of Karpathy's splits; if it is in another format, give `format`"
                )
            for name, info in rows:
                key = str(PurePosixPath(name).with_suffix(""))
                yield image_record(key, info, self.image_folder(file.parent), name)


def _is_own(file: Path) -> bool:
    """Whether a file is none of those that the `datasets` library calls `dataset_*.json`."""
    return file.name not in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def _image(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and info of an image."""
    info: dict[str, Any] = {name: row[name] for name in ("imgid", "cocoid") if name in row}
    info["captions"] = [sentence["raw"] for sentence in row["sentences"]]
    info["split"] = "train" if row["split"] == "restval" else row["split"]
    return str(PurePosixPath(row.get("filepath", ""), row["filename"])), info
