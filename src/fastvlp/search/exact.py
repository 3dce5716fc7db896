"""Items in memory. A search compares the query with every vector, so it misses none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fastvlp.search.checks import Scalar

# Number of queries in one matrix product.
QUERIES = 64


def fits(info: Mapping[str, Scalar], where: Mapping[str, Sequence[Scalar]]) -> bool:
    """Whether an item has, for each field, one of the values. true is not 1."""
    return all(
        name in info and any(info[name] == value and _is_bool(info[name]) == _is_bool(value) for value in values)
        for name, values in where.items()
    )


def _is_bool(value: Scalar) -> bool:
    return isinstance(value, bool)


class ExactItems:
    """Items by row. `ids`, `infos`: of each row."""

    def __init__(self, width: int):
        self.ids: list[str] = []
        self.infos: list[dict[str, Scalar]] = []
        self._row_of: dict[str, int] = {}
        self._vector_NE = np.empty((0, width), np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def put(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """Adds items, or replaces those that have one of the ids."""
        new = [id for id in dict.fromkeys(ids) if id not in self._row_of]
        self._row_of |= {id: len(self) + i for i, id in enumerate(new)}
        self.ids += new
        self.infos += [{}] * len(new)
        if len(self) > len(self._vector_NE):
            # The capacity doubles, so that each row is copied only a few times even if items are added one by one.
            held, width = self._vector_NE.shape
            self._vector_NE = np.resize(self._vector_NE, (max(len(self), 2 * held), width))
        for id, vector, info in zip(ids, vectors, infos):
            row = self._row_of[id]
            self._vector_NE[row], self.infos[row] = vector, dict(info)

    def delete(self, ids: Iterable[str]) -> None:
        """Deletes those of the items that exist. The last item takes the place of each deleted one."""
        for id in ids:
            if (row := self._row_of.pop(id, None)) is None:
                continue
            last_id, last_info = self.ids.pop(), self.infos.pop()
            if last_id != id:
                self.ids[row], self.infos[row], self._row_of[last_id] = last_id, last_info, row
                self._vector_NE[row] = self._vector_NE[len(self)]

    def search(
        self, query_QE: np.ndarray, k: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for each query the rows of the `k` nearest items and their cosines, best first; of equal ones, the first
        rows first."""
        rows = None
        if where:
            rows = np.array([row for row, info in enumerate(self.infos) if fits(info, where)], np.int64)
        results = []
        for first in range(0, len(query_QE), QUERIES):
            vector_NE = self._vector_NE[: len(self)] if rows is None else self._vector_NE[rows]
            for score_N in query_QE[first : first + QUERIES] @ vector_NE.T:
                best = _best(score_N, k)
                results.append((best if rows is None else rows[best], score_N[best]))
        return results


def _best(score_N: np.ndarray, k: int) -> np.ndarray:
    """Returns the rows of the `k` highest scores, best first; of equal ones, the first."""
    rows = np.arange(len(score_N))
    if k < len(rows):
        edge = np.partition(score_N, len(rows) - k)[len(rows) - k]
        above = np.flatnonzero(score_N > edge)
        rows = np.concatenate([above, np.flatnonzero(score_N == edge)[: k - len(above)]])
    return rows[np.argsort(-score_N[rows], kind="stable")]
