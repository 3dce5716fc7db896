"""Writes shards of emoji with their English names and keywords: 1,000 pairs to tune on, 150 and 300 held out (docs/log.md).

    python bench/emoji_pairs.py EMOJI OUT

EMOJI holds examples.jsonl and images.zip, a line and an image for each emoji of Noto.
"""

import json
import random
import sys
import zipfile
from pathlib import Path

from fastvlp import Record, ShardWriter

SPLITS = {"train": slice(0, 1000), "val": slice(1000, 1150), "test": slice(1150, 1450)}


def main(source: Path, out: Path) -> None:
    lines = (source / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    # The skin tones of an emoji are nearly the same picture.
    rows = [row for row in map(json.loads, lines) if not row["skin_tone"]]
    random.Random(0).shuffle(rows)
    with zipfile.ZipFile(source / "images.zip") as images:
        for split, part in SPLITS.items():
            with ShardWriter(out / split) as writer:
                for row in rows[part]:
                    keywords = [", ".join(row["keywords"])] if row["keywords"] else []
                    info = {"captions": [row["captions"][0], *keywords], "captions_zh": row["captions_zh"][:1]}
                    writer.write(Record(key=row["image"], images=(images.read(row["file"]),), info=info))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
