"""NLVR2 (Suhr et al. 2019, arXiv 1811.00491) as its repository has it: `train.json`, `dev.json`, `test1.json`, JSON lines,
and images in `train/DIRECTORY/`, `dev/` and `test1/`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.jsonlines import read_json_lines
from fastvlp.data.sources.paths import Images, in_form, pictured

SPLITS = ("train", "dev", "test1", "test2")


def files(path: Path) -> dict[str, Path]:
    """{split: its file} of the repository, its `data`, or one file alone."""
    if path.is_file():
        return {path.stem: path}
    places = ((split, folder / f"{split}.json") for split in SPLITS for folder in (path, path / "data"))
    return {split: file for split, file in places if file.is_file()}


def read(path: Path, images: Images | None = None) -> Iterator[Record | Dropped]:
    """Yields one record a pair of images, keyed `{split}-{set}-{pair}`, with its statements; `group` is what the pairs of a
    set share, for splitting."""
    for split, file in files(path).items():
        pairs: dict[str, dict[str, Any]] = defaultdict(lambda: {"statements": []})
        folders: dict[str, str] = {}
        with in_form(file, "NLVR2"):
            for row in read_json_lines(file):
                pair = row["identifier"].rpartition("-")[0]
                label = {"true": True, "false": False}[str(row["label"]).lower()]
                pairs[pair]["statements"].append({"text": row["sentence"], "label": label})
                folders[pair] = f"{split}/{row['directory']}" if "directory" in row else split
        for pair, info in pairs.items():
            info |= {"group": pair.rpartition("-")[0], "split": split}
            names = (f"{folders[pair]}/{pair}-img{k}.png" for k in (0, 1))
            yield pictured(pair, info, images or file.parent, *names)
