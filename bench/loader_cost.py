"""Time of the loader for a pair whose image is decoded, and the part of it that images on a GPU would save.

    python bench/loader_cost.py photos/train

Microseconds of CPU time of one thread a pair, median of the turns: to make batches from the cache of decoded images, and the
part of it that copies images, which is all that images on the device would save; and the bytes of an image that cross the bus.
Beside them, how many pairs a second one thread makes, and how many one GPU trains at 400 TFLOP/s, a little less than half of an
H100's peak, with CLIP's towers. Half a minute on one core. Rows are appended to bench/results/loader_cost.jsonl.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from batch_padding import Options as PaddingOptions
from batch_padding import show, tower_flops
from records import RESULTS, append, stamp
from tyro.conf import Positional

from fastvlp.data.loader import Row
from fastvlp.data.pairs import PairData
from fastvlp.data.tokenize import Tokenizer

RATE = 400e12


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Positional[str]
    """A split of image-text pairs."""
    sizes: tuple[int, ...] = (112, 224)
    """Sides of the images in pixels."""
    batch: int = 256
    """Pairs of a batch."""
    batches: int = 4
    """Different batches, which are made in turn."""
    turns: int = 5
    """Times that each of them is made from the cache."""
    tokens: int = 20
    """Tokens of a text, where the FLOPs of towers are counted."""
    out: Path = RESULTS / "loader_cost.jsonl"
    """File that rows are appended to."""


def cost(o: Options, size: int, tokenizer: Tokenizer) -> dict[str, Any]:
    data = PairData(train=o.data, batch_size=o.batch)
    rows = data.rows("train", tokenizer, size, strict=False)
    assert rows is not None and rows.make_hashed is not None
    parts = [[Row(i, i) for i in range(n * o.batch, (n + 1) * o.batch)] for n in range(o.batches)]
    # The first turn decodes.
    images = [rows.make_hashed(part)[0].image for part in parts]
    whole, copies = [], []
    for turn in range(o.turns * o.batches):
        began = time.process_time()
        rows.make_hashed(parts[turn % o.batches])
        middle = time.process_time()
        torch.stack(list(images[turn % o.batches].unbind()))
        whole.append((middle - began) / o.batch)
        copies.append((time.process_time() - middle) / o.batch)
    seconds = statistics.median(whole)
    row = {"arm": f"{size} pixels", "pair_us": 1e6 * seconds, "image_us": 1e6 * statistics.median(copies)}
    return row | {"pairs_per_s": 1 / seconds, "image_bytes": 3 * size * size}


def gpu_pairs(o: Options) -> dict[str, float]:
    """Pairs a second that towers of each kind train at `RATE`, on images of 224 pixels."""
    found = {}
    for towers in ("b32", "b16"):
        text, image = tower_flops(PaddingOptions(towers=towers), o.tokens)
        found |= {f"{towers}, keep {keep}": RATE / (text[o.tokens] + flops) for keep, flops in image.items()}
    return found


def main(o: Options) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(PairData(train=o.data, batch_size=o.batch).texts(), vocab_size=8000)
    rows = [cost(o, size, tokenizer) for size in o.sizes]
    columns = {"pair_us": ".0f", "image_us": ".0f", "pairs_per_s": ",.0f", "image_bytes": ",d"}
    show("loading from the cache, one thread", rows, columns)
    gpu = [
        {"arm": name, "gpu_pairs_per_s": rate, "gb_per_s": 3 * 224**2 * rate / 1e9}
        for name, rate in gpu_pairs(o).items()
    ]
    show("pairs that a GPU takes at 400 TFLOP/s", gpu, {"gpu_pairs_per_s": ",.0f", "gb_per_s": ".2f"})
    common = stamp("cpu", "loader_cost.py") | {name: value for name, value in asdict(o).items() if name != "out"}
    append(o.out, [common | row for row in (*rows, *gpu)])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
