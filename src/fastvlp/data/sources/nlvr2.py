"""NLVR2 (Suhr et al. 2019, arXiv 1811.00491) as its repository has it: `train.json`, `dev.json`, `test1.json`, JSON lines,
and images in `train/DIRECTORY/`, `dev/` and `test1/`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.data.sources.interface import AnnotationSource, Item, Match
from fastvlp.data.sources.source_files import each_row, image_record, read_json_lines

SPLITS = ("train", "dev", "test1", "test2")


@dataclass(frozen=True, kw_only=True)
class NLVR2Source(AnnotationSource):
    """Statements about pairs of photographs."""

    name = "nlvr2"
    summary = "NLVR2's folder with data/train.json, dev.json and test1.json, or one of these files"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        if path.is_file():
            return [path]
        places = (folder / f"{split}.json" for split in SPLITS for folder in (path, path / "data"))
        return list({file.stem: file for file in places if file.is_file()}.values())

    @classmethod
    def match(cls, path: Path) -> Match:
        # Other sets have a train.json too.
        test = path.is_dir() and any(file.stem == "test1" for file in cls.files(path))
        return Match.NAMES if test else Match.NONE

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record a pair of images, keyed `{split}-{set}-{pair}`, with its statements; the pairs of a set share
        their `group`."""
        for file in self.files(path):
            split = file.stem
            pairs: dict[str, dict[str, Any]] = defaultdict(lambda: {"statements": []})
            folders: dict[str, str] = {}

            def add(
                row: dict[str, Any], split: str = split, pairs: Any = pairs, folders: dict[str, str] = folders
            ) -> None:
                pair = row["identifier"].rpartition("-")[0]
                label = {"true": True, "false": False}[str(row["label"]).lower()]
                statement = {"text": row["sentence"], "label": label}
                folder = f"{split}/{row['directory']}" if "directory" in row else split
                pairs[pair]["statements"].append(statement)
                folders[pair] = folder

            yield from each_row(read_json_lines(file), file.name, add)
            for pair, info in pairs.items():
                info |= {"group": pair.rpartition("-")[0], "split": split}
                names = (f"{folders[pair]}/{pair}-img{k}.png" for k in (0, 1))
                yield image_record(pair, info, self.image_folder(file.parent), *names)
