"""Open a split of many made rows in a fresh process: seconds, and memory that is not shared with the files.

    python bench/many_rows.py --rows 10000000
    python bench/many_rows.py --rows 100000 --real
    python bench/many_rows.py --rows 100000 --real --checkout ../earlier

Each row is an image of 20 kB and a text. The tars are sparse files of the right size, and the index and the lengths of the
captions are written by the code that writes them otherwise. With `real`, small records are written by the writer of the
checkout, which counts their lengths too; for earlier commits. Measured one after the other in one process: opening, 1,000
random records, the rows of the first ten batches, then batches of rows of one length: reading the lengths, ten batches, and
ten batches in the middle of the second epoch, with a fixed number of rows and with a budget of tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tyro
from records import RESULTS, append, stamp

from fastvlp.data.records.index_files import NAME
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.split_index import Tar, write_split_index
from fastvlp.data.records.tar_index import KINDS, TarIndex
from fastvlp.data.stored_lengths import caption_lengths
from fastvlp.data.streams import blocks
from fastvlp.data.tokenize import Tokenizer

_BLOCK, _IMAGE, _TEXT = 512, 20_480, 512

_MAX_LENGTH = 50

_WRITE = """
import random, sys
from fastvlp.batch import Record
from fastvlp.data.records.shards import ShardWriter
words = [f"w{i}" for i in range(5000)]
with ShardWriter(sys.argv[1], 10_000) as writer:
    for i in range(int(sys.argv[2])):
        caption = " ".join(random.Random(i).choices(words, k=5 + i % 11))
        writer.write(Record(key=f"r{i:09d}", images=(bytes([255, 216]) + bytes(98),), info={"caption": caption}))
"""

_COUNT = """
import sys, time
from fastvlp.data.records.shards import Shards
from fastvlp.data.tokenize import Tokenizer
try:
    from fastvlp.data.stored_lengths import caption_lengths
except ImportError:
    from fastvlp.data.pairs import caption_lengths
shards = Shards(sys.argv[1])
tokenizer = Tokenizer.load(sys.argv[2])
begin = time.process_time()
caption_lengths(shards, tokenizer, "captions", 50)
print(time.process_time() - begin)
"""

_READ = """
import json, random, sys, time
from fastvlp.data.batching import Grouping
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData
from fastvlp.data.records.shards import Shards
from fastvlp.data.tokenize import Tokenizer

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    kb = {name: int(value.split()[0]) for name, value in lines.items()}
    return {"pss_mb": kb["Pss"] / 1024, "anonymous_mb": kb["Anonymous"] / 1024}

def lap(name):
    global begin
    now = time.perf_counter(), time.process_time()
    out[name] = {"wall_s": now[0] - begin[0], "cpu_s": now[1] - begin[1], **memory()}
    begin = time.perf_counter(), time.process_time()

out = {"before": memory()}
tokenizer = Tokenizer.load(sys.argv[2])
begin = time.perf_counter(), time.process_time()
shards = Shards(sys.argv[1])
count = len(shards)
lap("open")
for i in random.Random(0).sample(range(count), 1000):
    shards.image_count(i), shards.key(i)
lap("thousand_records")
loader = Loader(count, None, batch_size=256, seed=0)
for s in range(10):
    loader.rows(s)
lap("ten_batches")
del loader
rows = PairData(train=sys.argv[1], batch_size=256, cache=False).rows("train", tokenizer, 224, strict=False)
lap("open_again")
lengths = rows.lengths()
lap("lengths")
for name, grouping in (("grouped", Grouping()), ("budget", Grouping(max_tokens=8192))):
    loader = Loader(count, None, batch_size=256, seed=0, grouping=grouping, lengths=lambda: lengths)
    for s in range(10):
        loader.rows(s)
    lap(f"ten_batches_{name}")
    middle = int(1.5 * loader.plan.epoch()) if name == "budget" else count * 3 // 512
    for s in range(middle, middle + 10):
        loader.rows(s)
    lap(f"middle_of_epoch_2_{name}")
    del loader
print(json.dumps({"rows": count, **out}))
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    rows: int = 10_000_000
    """Records of the split."""
    per_tar: int = 10_000
    """Records of a tar."""
    real: bool = False
    """Write small records by the checkout's own writer."""
    checkout: Path = Path(__file__).parent.parent
    """The code that is measured."""
    out: Path = RESULTS / "many_rows.jsonl"
    """File that a row is appended to."""


def made_split(folder: Path, rows: int, per_tar: int) -> None:
    """Sparse tars and their index."""
    record = _BLOCK + _IMAGE + _BLOCK + _TEXT
    tars = []
    for first in range(0, rows, per_tar):
        path = folder / f"{first // per_tar:05d}.tar"
        with path.open("wb") as file:
            file.truncate(min(per_tar, rows - first) * record + 2 * _BLOCK)
        tars.append(Tar(str(path), path.stat().st_size, path.stat().st_mtime_ns))

    def indexes() -> Iterator[tuple[int, TarIndex]]:
        for t, tar in enumerate(tars):
            count = min(per_tar, rows - t * per_tar)
            keys = "".join(f"r{i:09d}\n" for i in range(t * per_tar, t * per_tar + count)).encode()
            begin_R = np.arange(count, dtype=np.int64)[:, None] * record
            assert tar.mtime_ns is not None
            yield (
                tar.mtime_ns,
                TarIndex(
                    first=np.arange(0, 2 * count + 1, 2, dtype=np.uint32),
                    kind=np.tile(np.array([KINDS.index("image"), KINDS.index("json")], np.uint8), count),
                    offset=(begin_R + np.array([_BLOCK, 2 * _BLOCK + _IMAGE])).reshape(-1),
                    length=np.tile(np.array([_IMAGE, _TEXT], np.uint32), count),
                    keys=np.frombuffer(keys, np.uint8),
                    key=np.arange(0, 11 * count + 1, 11, dtype=np.uint32),
                    damage=[],
                ),
            )

    def read(tar: str, offset: int, length: int) -> bytes:
        with Path(tar).open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    with (folder / NAME).open("wb") as out:
        write_split_index(out.fileno(), folder, tars, indexes(), read)


def made_lengths(folder: Path, tokenizer: Tokenizer) -> None:
    """The lengths of captions of 5 to 15 words, in the file where counting would have left them."""
    shards = Shards(folder)

    def counted(*_: object) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in blocks(len(shards), 1 << 20):
            n = part.stop - part.start
            yield 7 + np.random.default_rng(part.start).integers(0, 11, n), np.ones(n, np.int64)

    with patch("fastvlp.data.stored_lengths.counted_rows", counted):
        caption_lengths(shards, tokenizer, "captions", _MAX_LENGTH)


def made_tokenizer(path: Path) -> Tokenizer:
    Tokenizer.train([" ".join(f"w{i}" for i in range(5000))] * 3, vocab_size=8000).save(path)
    return Tokenizer.load(path)


def run(code: str, checkout: Path, *words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "split"
        folder.mkdir()
        begin = time.perf_counter()
        if options.real:
            run(_WRITE, options.checkout, folder, options.rows)
        else:
            made_split(folder, options.rows, options.per_tar)
        row = {"made_s": time.perf_counter() - begin}
        words = Path(name) / "tokenizer.json"
        tokenizer = made_tokenizer(words)
        if options.real:
            row["counting_cpu_s"] = float(run(_COUNT, options.checkout, folder, words))
        else:
            made_lengths(folder, tokenizer)
        for kind in ("index", "lengths"):
            row[f"{kind}_mb"] = sum(path.stat().st_size for path in folder.glob(f"*{kind}*")) / 2**20
        row |= json.loads(run(_READ, options.checkout, folder, words))
    command = ["git", "-C", str(options.checkout), "rev-parse", "--short", "HEAD"]
    measured = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    row = {**stamp("cpu", "many_rows.py"), "measured": measured, **row}
    row["command"] = f"python bench/many_rows.py --rows {options.rows}{' --real' if options.real else ''}"
    append(options.out, [row])
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
