"""Equal vectors as one. In a graph of neighbours, equal vectors link to each other alone: what lies behind them is not found
(hnswlib issue 341). So a graph has one node for all items that have a vector, and the engine keeps the others beside it."""

from __future__ import annotations

import hashlib

import numpy as np

# Equal pictures that are embedded in different batches differ in the last bits.
DECIMALS = 4


def vector_keys(vectors: np.ndarray) -> list[str]:
    """Returns a text for each vector [n E], the same for those that are equal to about four decimals."""
    # The sum makes -0 a 0.
    rounded = np.round(np.asarray(vectors, np.float32), DECIMALS) + np.float32(0)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rounded]
