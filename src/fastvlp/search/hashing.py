"""Search by binary codes: codes that are similar to the query's give candidates, which are then scored exactly.

A code is the signs of projections of a vector; the share of bits in which two codes differ grows with the angle between
their vectors (Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002). Codes fit into memory where
vectors do not: 256 bits are 32 bytes, 256 floats are 1024. Vectors are read for candidates alone, so that they may stay on
the disk (`np.memmap`).

Embeddings of images lie in a narrow cone, and those of texts in another one, where most bits would be the same for all of
them. So items are centred on their mean, and queries on the mean of queries (bench/search_latency.py).

Dimension key here: N vectors, E their width, C bits of a code, W words of 64 bits, Q queries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Number of vectors from which a projection is learned, and number of rows that are projected at a time.
SAMPLE, ROWS = 50_000, 65_536


class Projection(NamedTuple):
    """A projection from a vector to a code: bit c of x says whether (x - mean) @ map[:, c] is above 0."""

    mean_E: np.ndarray
    map_EC: np.ndarray


def random_projection(width: int, bits: int, seed: int = 0, mean_E: np.ndarray | None = None) -> Projection:
    """Draws directions, orthogonal in blocks of `width`, which estimate angles with less variance than independent ones do
    (Ji et al., "Super-bit locality-sensitive hashing", NeurIPS 2012). `mean_E`: of the items."""
    mean = np.zeros(width, np.float32) if mean_E is None else mean_E.astype(np.float32)
    return Projection(mean, np.concatenate([*_rotations(width, bits, seed)], 1))


def learned_projection(vector_NE: np.ndarray, bits: int, rounds: int = 50, seed: int = 0) -> Projection:
    """Learns directions by ITQ (Gong and Lazebnik, "Iterative quantization", CVPR 2011): principal components, rotated so that
    vectors lie close to the corners of a cube. For more bits than the vectors are wide, several rotations are learned, each
    from another start."""
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
            # The nearest corner of each row, then the rotation that brings rows closest to their corners (Procrustes).
            left, _, right = np.linalg.svd(x_NC.T @ np.sign(x_NC @ rotation))
            rotation = left @ right
        maps.append(principal_EC @ rotation)
    return Projection(mean_E.astype(np.float32), np.concatenate(maps, 1).astype(np.float32))


def _rotations(width: int, bits: int, seed: int) -> list[np.ndarray]:
    """Draws blocks [E c] of orthonormal columns, `bits` columns in all."""
    draw = np.random.default_rng(seed)
    counts = [min(width, bits - first) for first in range(0, bits, width)]
    return [np.linalg.qr(draw.normal(size=(width, width)))[0][:, :c].astype(np.float32) for c in counts]


def _sample(vector_NE: np.ndarray, seed: int) -> np.ndarray:
    if len(vector_NE) <= SAMPLE:
        return np.asarray(vector_NE)
    return vector_NE[np.sort(np.random.default_rng(seed).choice(len(vector_NE), SAMPLE, replace=False))]


def pack(bit_NC: np.ndarray) -> np.ndarray:
    """Packs bool [N C] to uint64 [W N]. Words come first, so that one word of a query is compared with a row of them."""
    bytes_NB = np.packbits(bit_NC, axis=1)
    padded = np.pad(bytes_NB, ((0, 0), (0, -bytes_NB.shape[1] % 8)))
    return np.ascontiguousarray(padded.view(np.uint64).T)


def encode(projection: Projection, vector_NE: np.ndarray, mean_E: np.ndarray | None = None) -> np.ndarray:
    """Returns codes of vectors [N E], uint64 [W N]. `mean_E`: what they are centred on; None: the mean of the items."""
    mean_E = projection.mean_E if mean_E is None else mean_E
    parts = [
        pack((vector_NE[first : first + ROWS] - mean_E) @ projection.map_EC > 0)
        for first in range(0, len(vector_NE), ROWS)
    ]
    return np.concatenate(parts, 1) if parts else pack(np.empty((0, projection.map_EC.shape[1]), bool))


def hamming(code_W: np.ndarray, code_WN: np.ndarray) -> np.ndarray:
    """Counts the bits in which each item's code differs from one code: uint16 [N]."""
    total_N = np.zeros(code_WN.shape[1], np.uint16)
    for word, word_N in zip(code_W, code_WN):
        total_N += np.bitwise_count(word ^ word_N)
    return total_N


def closest(distance_N: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` smallest distances; of equal ones, the first."""
    if count >= len(distance_N):
        return np.arange(len(distance_N))
    edge = np.partition(distance_N, count - 1)[count - 1]
    below = np.flatnonzero(distance_N < edge)
    return np.concatenate([below, np.flatnonzero(distance_N == edge)[: count - len(below)]])


class HashSearch:
    """Exact search among the candidates that codes give.

    Attributes:
        vector_NE: Unit rows.
        code_WN: Their codes, which are in memory, C / 8 bytes for each vector.
    """

    def __init__(self, vector_NE: np.ndarray, projection: Projection):
        """`vector_NE`: unit rows, floats of any precision, in memory or on the disk."""
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
        """Finds the nearest items of each query.

        Args:
            query_QE: Unit rows.
            k: How many to find.
            candidates: How many items, the nearest by code, are scored exactly.
            mean_E: The mean of such queries, where they are of another kind than the items, such as texts for images; None:
                the mean of the items.
            among_N: bool, which items to search among; None: all.

        Returns:
            Indices [Q k] and cosines [Q k], best first; fewer than k where there are fewer items or candidates.
        """
        query_QE = np.asarray(query_QE, np.float32)
        code_WQ = encode(self.projection, query_QE, mean_E)
        index_N = None if among_N is None else np.flatnonzero(among_N)
        code_WN = self.code_WN if index_N is None else self.code_WN[:, index_N]
        k = min(k, candidates, code_WN.shape[1])
        indices, scores = np.empty((len(query_QE), k), np.int64), np.empty((len(query_QE), k), np.float32)
        for q, query_E in enumerate(query_QE):
            near = closest(hamming(code_WQ[:, q], code_WN), candidates)
            near = near if index_N is None else index_N[near]
            score = self.vector_NE[near].astype(np.float32, copy=False) @ query_E
            best = np.argsort(-score, kind="stable")[:k]
            indices[q], scores[q] = near[best], score[best]
        return indices, scores
