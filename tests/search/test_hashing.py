"""Codes keep angles, and their candidates contain what an exact search finds."""

import numpy as np
import pytest

from fastvlp.search.hashing import (
    HashSearch,
    closest,
    encode,
    hamming,
    learned_projection,
    pack,
    random_projection,
)

WIDTH = 64


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def structured(number, seed, shift=0.0):
    """Clusters in 16 of 64 dimensions and some noise, in a narrow cone; `shift` moves the cone, as texts' is from images'."""
    world, draw = np.random.default_rng(0), np.random.default_rng(seed)
    axes, centres, cone, other = (world.normal(size=size) for size in ((16, WIDTH), (40, 16), WIDTH, WIDTH))
    latent = centres[draw.integers(40, size=number)] + 0.7 * draw.normal(size=(number, 16))
    return unit(latent @ axes + 0.3 * draw.normal(size=(number, WIDTH)) + 5 * cone + 5 * shift * other)


def recall(indices, query, vectors, k=10):
    exact = np.argsort(-(query @ vectors.T), axis=1)[:, :k]
    return np.mean([len({*row} & {*best}) / k for row, best in zip(indices, exact)])


@pytest.mark.parametrize("bits", [1, 63, 64, 65, 200])
def test_distances_count_differing_bits(bits):
    draw = np.random.default_rng(bits)
    one, many = draw.random(bits) > 0.5, draw.random((50, bits)) > 0.5
    assert np.array_equal(hamming(pack(one[None])[:, 0], pack(many)), (one != many).sum(1))


def test_the_share_of_differing_bits_estimates_the_angle():
    x = unit(np.random.default_rng(0).normal(size=(200, WIDTH)))
    code = encode(random_projection(WIDTH, 64 * 64), x)
    angles = np.arccos(np.clip(x[0] @ x[1:].T, -1, 1)) / np.pi
    # A standard error of at most 0.5 / sqrt(4096) = 0.008.
    assert np.abs(hamming(code[:, 0], code[:, 1:]) / 4096 - angles).max() < 0.035


@pytest.mark.parametrize("bits", [16, 64, 96])
def test_projections_are_orthonormal_in_blocks_and_deterministic(bits):
    x = structured(500, seed=1)
    for make in (lambda: random_projection(WIDTH, bits), lambda: learned_projection(x, bits, rounds=3)):
        projection = make()
        assert projection.map_EC.shape == (WIDTH, bits) and np.array_equal(projection.map_EC, make().map_EC)
        for first in range(0, bits, WIDTH):
            block = projection.map_EC[:, first : first + WIDTH].astype(np.float64)
            assert np.allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)


def test_each_round_of_learning_reduces_the_error():
    x = structured(2000, seed=1)
    centred = x - x.mean(0)
    errors = []
    for rounds in (0, 1, 5, 30):
        y = centred @ learned_projection(x, 16, rounds=rounds).map_EC
        errors.append(np.square(np.sign(y) - y).mean())
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] * 1.005


def test_closest_returns_the_smallest_distances():
    distance = np.array([3, 1, 2, 1, 2, 2, 9], np.uint16)
    assert sorted(closest(distance, 3)) == [1, 2, 3] and sorted(closest(distance, 4)) == [1, 2, 3, 4]
    assert sorted(closest(distance, 70)) == [*range(7)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "learned"])
def test_candidates_contain_the_exact_results(kind):
    """A fiftieth of the vectors as candidates, at a sixteenth of their memory: recall@10 of at least 0.98."""
    vectors, query = structured(20_000, seed=1), structured(100, seed=2)
    bits = 128
    projection = (
        random_projection(WIDTH, bits, mean_E=vectors.mean(0))
        if kind == "random"
        else learned_projection(vectors, bits)
    )
    search = HashSearch(vectors, projection)
    places, scores = search.search(query, 10, candidates=400)
    assert recall(places, query, vectors) >= 0.98
    assert np.allclose(scores, np.take_along_axis(query @ vectors.T, places, 1), atol=1e-6)
    assert (np.diff(scores) <= 0).all() and vectors.nbytes == 16 * search.code_WN.nbytes
    # All as candidates: an exact search.
    assert recall(search.search(query[:5], 10, candidates=20_000)[0], query[:5], vectors) == 1


def test_few_learned_bits_recall_more_than_random_ones():
    vectors, query = structured(20_000, seed=1), structured(100, seed=2)
    projections = random_projection(WIDTH, 32, mean_E=vectors.mean(0)), learned_projection(vectors, 32)
    random, learned = (
        recall(HashSearch(vectors, projection).search(query, 10, 400)[0], query, vectors) for projection in projections
    )
    assert learned > random + 0.02


def test_centring_queries_on_their_own_mean_recalls_more():
    vectors, query = structured(20_000, seed=1), structured(200, seed=2, shift=0.7)
    projection = random_projection(WIDTH, 64, mean_E=vectors.mean(0))
    own, items = (
        recall(HashSearch(vectors, projection).search(query, 10, 400, mean_E=mean)[0], query, vectors)
        for mean in (query.mean(0), None)
    )
    assert own > items + 0.02


def test_search_among_some_items():
    vectors, query = structured(500, seed=1), structured(5, seed=2)
    search, among = HashSearch(vectors, random_projection(WIDTH, 64)), np.arange(500) % 7 == 3
    places, scores = search.search(query, 10, 500, among_N=among)
    best = np.argsort(-(query @ vectors[among].T), axis=1)[:, :10]
    assert (places == np.flatnonzero(among)[best]).all() and np.allclose(
        scores[:, 0], (query @ vectors[among].T).max(1)
    )
    assert search.search(query, 10, among_N=np.zeros(500, bool))[0].shape == (5, 0)


def test_vectors_can_be_on_disk_in_half_precision(tmp_path):
    vectors, query = structured(3000, seed=1), structured(5, seed=2)
    vectors.astype(np.float16).tofile(tmp_path / "vectors")
    stored = np.memmap(tmp_path / "vectors", np.float16, mode="r").reshape(-1, WIDTH)
    places, scores = HashSearch(stored, random_projection(WIDTH, 128)).search(query, 10, 500)
    assert recall(places, query, vectors) >= 0.9 and scores.dtype == np.float32
    assert HashSearch(vectors[:3], random_projection(WIDTH, 128)).search(query, 10)[0].shape == (5, 3)
    assert HashSearch(vectors[:0], random_projection(WIDTH, 128)).search(query, 10)[0].shape == (5, 0)
