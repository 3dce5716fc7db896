"""The vectors that `vlp embed` wrote, searched where they are: their codes are in memory, they themselves on the disk.

Of equal vectors one is a candidate: a thousand copies would leave no place for others. It stands for them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from fastvlp.errors import UserError
from fastvlp.files import whole_file
from fastvlp.search.calibration import Calibration, PairSample
from fastvlp.search.checks import Scalar
from fastvlp.search.engines.interface import Hit, IndexEngine, Item, Stamp, checked_stamp, vector_keys
from fastvlp.search.exact import fits
from fastvlp.search.hashing import HashSearch, learned_projection

if TYPE_CHECKING:
    from fastvlp.search.pictures import PictureStore

VECTORS = "vectors.npy"
BITS = 256
# So many candidates of a search for k are scored exactly (bench/search_latency.py: recall@10 of 0.999 or more).
LEAST, EACH = 1000, 20
READ_ONLY = (
    "codes of embedded vectors are read-only; to add and delete, make an index with `vlp index build INDEX FOLDER`"
)


class CodesIndex(IndexEngine):
    """codes:FOLDER. A search takes 1 / 13 of the exact product's time, and 32 bytes of memory a vector besides ids and infos
    (bench/search_latency.py); a filter looks at every item. Nothing can be added or deleted."""

    prefixes = ("codes:",)
    address = "codes:FOLDER, read-only, for a folder that `vlp embed` wrote"
    # All vectors are read from the disk for each query.
    small = 2**22

    def __init__(self, uri: str, stamp: Stamp | None = None, create: bool = False):
        # Imports torch, which another engine does not need.
        from fastvlp.search.embedded import open_embedded, read_part

        folder = _folder(uri)
        embedded = open_embedded(folder)
        self.stamp = checked_stamp(asdict(embedded.stamp), stamp, uri)
        self._ids: list[str] = []
        self._infos: list[dict[str, Scalar]] = []
        texts, total_E, keys = 0, np.zeros(self.stamp.width), []
        pairs = PairSample(self.stamp.width)
        for part in map(read_part, embedded.parts):
            pairs.add(part.image[part.image_of_text], part.text)
            keys.append(_numbers(vector_keys(part.image)))
            self._ids += part.ids
            self._infos += part.infos
            texts, total_E = texts + len(part.text), total_E + part.text.sum(0)
        self._calibration = pairs.calibrated()
        if not self._ids:
            raise UserError(f"{folder}: it has no vectors of images; dropped.jsonl says why")
        # Which distinct vector each item has, the rows in the order of these, and where those of each begin.
        _, self._distinct_N = np.unique(np.concatenate(keys), return_inverse=True)
        self._row_by_distinct = np.argsort(self._distinct_N, kind="stable")
        self._begin = np.searchsorted(self._distinct_N[self._row_by_distinct], np.arange(self._distinct_N.max() + 2))
        self._row_of = {id: row for row, id in enumerate(self._ids)}
        images = (read_part(path).image for path in embedded.parts)
        vector_NE = on_disk(folder / VECTORS, images, (len(self._ids), self.stamp.width))
        self._search_codes = HashSearch(vector_NE, learned_projection(vector_NE, BITS))
        # Texts lie in a narrow cone of their own; centred on its mean, their codes say where in it each is.
        image_E = self._search_codes.projection.mean_E
        self._means = np.stack([image_E, total_E / texts if texts else image_E]).astype(np.float32)

    @classmethod
    def pictures(cls, uri: str) -> PictureStore | None:
        from fastvlp.search.embedded import open_embedded
        from fastvlp.search.thumbnails import shard_pictures

        return shard_pictures(open_embedded(_folder(uri)).data)

    def _add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> NoReturn:
        raise UserError(READ_ONLY)

    def _delete(self, ids: Sequence[str]) -> NoReturn:
        raise UserError(READ_ONLY)

    def _search(
        self, vectors: np.ndarray, k: int, offset: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[list[Hit]]:
        depth, fitting_N = k + offset, self._fitting(where)
        among_N, least = self._one_of_each(fitting_N), len(self._ids) if self.is_small(len(self._ids)) else LEAST
        results = []
        for query_E in vectors:
            # Of images or of texts, whichever the query is like.
            mean_E = self._means[(self._means @ query_E).argmax()]
            rows, _ = self._search_codes.search(
                query_E[None], depth, max(least, EACH * depth), mean_E=mean_E, among_N=among_N
            )
            hits = self._with_copies(query_E, rows[0], depth, fitting_N)
            results.append(hits[offset:])
        return results

    def _fitting(self, where: Mapping[str, Sequence[Scalar]]) -> np.ndarray | None:
        """Returns which items match a filter, bool [N]; None if all do."""
        return np.fromiter((fits(info, where) for info in self._infos), bool, len(self._infos)) if where else None

    def _one_of_each(self, fitting_N: np.ndarray | None) -> np.ndarray | None:
        """One of the fitting items of each distinct vector, bool [N]; None: all."""
        if len(self._begin) - 1 == len(self._ids):
            return fitting_N
        rows = np.arange(len(self._ids)) if fitting_N is None else np.flatnonzero(fitting_N)
        among_N = np.zeros(len(self._ids), bool)
        among_N[rows[np.unique(self._distinct_N[rows], return_index=True)[1]]] = True
        return among_N

    def _with_copies(
        self, query_E: np.ndarray, rows: np.ndarray, depth: int, fitting_N: np.ndarray | None
    ) -> list[Hit]:
        """Returns the hits of the rows and of those that have the same vector, best first."""
        copies: list[int] = []
        for distinct in self._distinct_N[rows]:
            equal = self._row_by_distinct[self._begin[distinct] : self._begin[distinct + 1]]
            copies += (equal if fitting_N is None else equal[fitting_N[equal]]).tolist()
            if len(copies) >= depth:
                break
        scores = self._search_codes.vector_NE[copies] @ query_E
        order = np.argsort(-scores, kind="stable")[:depth]
        return [Hit(self._ids[copies[i]], float(scores[i]), self._infos[copies[i]]) for i in order]

    def calibration(self) -> Calibration | None:
        return self._calibration

    def count(self) -> int:
        return len(self._ids)

    def _get(self, ids: Sequence[str]) -> Iterable[Item]:
        rows = [self._row_of[id] for id in ids if id in self._row_of]
        return [Item(self._ids[row], np.array(self._search_codes.vector_NE[row]), self._infos[row]) for row in rows]

    def close(self) -> None:
        """Does nothing: it has memory alone, and a file that is mapped into it."""


def _numbers(keys: Sequence[str]) -> np.ndarray:
    """Returns 64 bits of each key."""
    return np.array([int(key[:16], 16) for key in keys], np.uint64)


def _folder(uri: str) -> Path:
    return Path(uri.removeprefix(CodesIndex.prefixes[0]))


def on_disk(path: Path, parts: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Opens a file of all vectors [N E], which is made of the parts the first time. What is not asked for is not read."""
    if not path.exists():
        with whole_file(path, f"{path.name}.{os.getpid()}.tmp") as new:
            rows, first = np.lib.format.open_memmap(new, "w+", np.float32, shape), 0
            for part in parts:
                rows[first : first + len(part)] = part
                first += len(part)
            rows.flush()
    vectors: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if vectors.shape != shape:
        raise UserError(f"{path}: of shape {list(vectors.shape)}, and the folder's parts have {list(shape)}; delete it")
    return vectors
