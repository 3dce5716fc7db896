"""Binary codes that keep likeness, as a prefilter: a search in them gives candidates, which are scored exactly.

A code is the signs of a vector's projections, and the share of bits in which two differ grows with the angle between them
(Charikar 2002). Codes fit into memory where vectors do not: 256 bits are 32 bytes, 256 floats 1024. Vectors are read for
candidates alone, so that they may stay on the disk (`np.memmap`).

Embeddings lie in a narrow cone, and those of texts in another than those of images: a bit that is the same for nearly all
tells nothing. So items are centred on their mean, and queries on the mean of queries (bench/search_latency.py).

Dimension key here: N vectors, E their width, C bits of a code, W words of 64 bits, Q queries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Vectors that a projection is learned from, and rows that are projected at a time.
SAMPLE, ROWS = 50_000, 65_536


class Projection(NamedTuple):
    """Bit c of an item x is whether (x - mean) @ map[:, c] is above 0."""

    mean_E: np.ndarray
    map_EC: np.ndarray


def random_projection(width: int, bits: int, seed: int = 0, mean_E: np.ndarray | None = None) -> Projection:
    """Directions that know nothing of the data, orthogonal in blocks of `width`, which estimate angles with less variance
    than independent ones (super-bits: Ji et al., NeurIPS 2012). `mean_E`: of the items."""
    mean = np.zeros(width, np.float32) if mean_E is None else mean_E.astype(np.float32)
    return Projection(mean, np.concatenate([*_rotations(width, bits, seed)], 1))


def learned_projection(vector_NE: np.ndarray, bits: int, rounds: int = 50, seed: int = 0) -> Projection:
    """ITQ (Gong and Lazebnik, CVPR 2011): the principal components, rotated until they lie close to the corners of a cube.
    More bits than the vectors are wide are several rotations, each learned from a start of its own."""
    sample_NE = _sample(vector_NE, seed).astype(np.float64)
    mean_E, width = sample_NE.mean(0), vector_NE.shape[1]
    _, _, axes = np.linalg.svd((sample_NE - mean_E).T @ (sample_NE - mean_E))
    maps = []
    for start in _rotations(width, bits, seed):
        c = start.shape[1]
        principal_EC = axes[:c].T
        x_NC = (sample_NE - mean_E) @ principal_EC
        rotation = start[:c].astype(np.float64) if c == width else np.linalg.qr(start[:c].astype(np.float64))[0]
        for _ in range(rounds):
            # The corner nearest to each row; then the rotation that brings rows nearest to their corners (Procrustes).
            left, _, right = np.linalg.svd(x_NC.T @ np.sign(x_NC @ rotation))
            rotation = left @ right
        maps.append(principal_EC @ rotation)
    return Projection(mean_E.astype(np.float32), np.concatenate(maps, 1).astype(np.float32))


def _rotations(width: int, bits: int, seed: int) -> list[np.ndarray]:
    """Blocks [E c] of orthonormal columns, `bits` of them in all."""
    draw = np.random.default_rng(seed)
    counts = [min(width, bits - first) for first in range(0, bits, width)]
    return [np.linalg.qr(draw.normal(size=(width, width)))[0][:, :c].astype(np.float32) for c in counts]


def _sample(vector_NE: np.ndarray, seed: int) -> np.ndarray:
    if len(vector_NE) <= SAMPLE:
        return np.asarray(vector_NE)
    return vector_NE[np.sort(np.random.default_rng(seed).choice(len(vector_NE), SAMPLE, replace=False))]


def pack(bit_NC: np.ndarray) -> np.ndarray:
    """bool [N C] -> uint64 [W N], words first: a query's word meets a whole row of them at once."""
    bytes_NB = np.packbits(bit_NC, axis=1)
    padded = np.pad(bytes_NB, ((0, 0), (0, -bytes_NB.shape[1] % 8)))
    return np.ascontiguousarray(padded.view(np.uint64).T)


def encode(projection: Projection, vector_NE: np.ndarray, mean_E: np.ndarray | None = None) -> np.ndarray:
    """Codes uint64 [W N] of items or, with the mean of queries, of queries."""
    mean_E = projection.mean_E if mean_E is None else mean_E
    parts = [
        pack((vector_NE[first : first + ROWS] - mean_E) @ projection.map_EC > 0)
        for first in range(0, len(vector_NE), ROWS)
    ]
    return np.concatenate(parts, 1) if parts else pack(np.empty((0, projection.map_EC.shape[1]), bool))


def hamming(code_W: np.ndarray, code_WN: np.ndarray) -> np.ndarray:
    """Bits in which each item's code differs from one code: uint16 [N]."""
    total_N = np.zeros(code_WN.shape[1], np.uint16)
    for word, word_N in zip(code_W, code_WN):
        total_N += np.bitwise_count(word ^ word_N)
    return total_N


def closest(distance_N: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` smallest; of equal ones at the end, the first."""
    if count >= len(distance_N):
        return np.arange(len(distance_N))
    edge = np.partition(distance_N, count - 1)[count - 1]
    below = np.flatnonzero(distance_N < edge)
    return np.concatenate([below, np.flatnonzero(distance_N == edge)[: count - len(below)]])


class HashSearch:
    """Exact search among the candidates that codes give.

    Attributes:
        code_WN: what is kept in memory, C / 8 bytes a vector.
    """

    def __init__(self, vector_NE: np.ndarray, projection: Projection):
        """`vector_NE`: unit rows, floats of any size, in memory or not."""
        self.vector_NE, self.projection = vector_NE, projection
        self.code_WN = encode(projection, vector_NE)

    def search(
        self,
        query_QE: np.ndarray,
        k: int,
        candidates: int = 1000,
        *,
        mean_E: np.ndarray | None = None,
        among_N: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places [Q k] and cosines [Q k] of the best of `candidates` items, best first; k or candidates beyond the items
        there are give all of them. `mean_E`: of some queries, where they are of another kind than the items, texts to find
        images by; None: they are like the items. `among_N`: bool, the items to look among."""
        query_QE = np.asarray(query_QE, np.float32)
        code_WQ = encode(self.projection, query_QE, mean_E)
        place_N = None if among_N is None else np.flatnonzero(among_N)
        code_WN = self.code_WN if place_N is None else self.code_WN[:, place_N]
        k = min(k, candidates, code_WN.shape[1])
        places, scores = np.empty((len(query_QE), k), np.int64), np.empty((len(query_QE), k), np.float32)
        for q, query_E in enumerate(query_QE):
            found = closest(hamming(code_WQ[:, q], code_WN), candidates)
            found = found if place_N is None else place_N[found]
            score = self.vector_NE[found].astype(np.float32, copy=False) @ query_E
            best = np.argsort(-score, kind="stable")[:k]
            places[q], scores[q] = found[best], score[best]
        return places, scores
