"""Made items, and a process that adds items until it is killed."""

from __future__ import annotations

import re
import sys
import tempfile
from itertools import count
from pathlib import Path

import numpy as np

from fastvlp.extensions import import_file
from fastvlp.search.engines.interface import IndexEngine, Stamp, open_index

# The engine of docs/guide/own-parts.md, in a file of its own.
OWN_ENGINE = Path(tempfile.mkdtemp()) / "numpy_index.py"
TEXT = (Path(__file__).parents[2] / "docs/guide/own-parts.md").read_text(encoding="utf-8")
OWN_ENGINE.write_text(
    re.findall(r"`numpy_index\.py`[^`]*?\n\n```python\n(.*?)```", TEXT, re.DOTALL)[0], encoding="utf-8"
)
import_file(OWN_ENGINE)
WIDTH = 16
STAMP = Stamp(fingerprint="f" * 32, width=WIDTH, model="made")


def made_vectors(number: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(number, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vector_of(i: int) -> np.ndarray:
    return made_vectors(1, seed=i)[0]


def fill(index: IndexEngine, number: int = 50) -> np.ndarray:
    """Adds items i0, i1 ..., and returns their vectors."""
    vectors = made_vectors(number)
    index.add([f"i{i}" for i in range(number)], vectors, [{"n": i, "even": i % 2 == 0} for i in range(number)])
    return vectors


def add_for_ever(uri: str, size: int) -> None:
    """Prints the number of each batch once it is acknowledged."""
    index = open_index(uri, STAMP)
    print("ready", flush=True)
    for batch in count():
        numbers = range(batch * size, (batch + 1) * size)
        index.add([f"i{i}" for i in numbers], np.stack([vector_of(i) for i in numbers]), [{"n": i} for i in numbers])
        print(batch, flush=True)


if __name__ == "__main__":
    add_for_ever(sys.argv[1], int(sys.argv[2]))
