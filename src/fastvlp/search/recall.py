"""The recall of an index compared with exact search, measured on a sample when the index is built."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastvlp.search.engines.interface import IndexEngine

# Items that are read at a time.
ROWS = 2000
# Numbers are added up in another order by each engine.
TOLERANCE = 1e-5


def measured_recall(index: IndexEngine, ids: Sequence[str], query_QE: np.ndarray, k: int = 10) -> float | None:
    """Returns the share of the `k` nearest that searches find, beside the product with every vector (recall@k).

    Args:
        index: The index.
        ids: Items to compare with; where the index has others too, these are not missed.
        query_QE: Unit rows.
        k: How many are searched for.

    Returns:
        0 to 1; None if there are no items or no queries.
    """
    best_QK = np.empty((len(query_QE), 0), np.float32)
    for first in range(0, len(ids), ROWS):
        items = index.get(ids[first : first + ROWS])
        if items:
            score_QN = query_QE @ np.stack([item.vector for item in items]).T
            best_QK = -np.sort(-np.concatenate([best_QK, score_QN], 1), axis=1)[:, :k]
    if not best_QK.size:
        return None
    hits_per_query = index.search(query_QE, best_QK.shape[1])
    # Of equal scores any will do.
    good = [sum(hit.score >= best[-1] - TOLERANCE for hit in hits) for best, hits in zip(best_QK, hits_per_query)]
    return float(np.mean(good)) / best_QK.shape[1]
