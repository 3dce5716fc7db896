"""Calibration: the meaning of the cosines of an index."""

import numpy as np
import pytest

from fastvlp.search.calibration import Calibration, PairSample, calibrated


def pairs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images around one direction, and texts that are near to their own."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(count, 64)) + 0.5
    text = image + rng.normal(size=(count, 64))
    return tuple(  # type: ignore[return-value]
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for rows in (image, text)
    )


def test_nineteen_of_twenty_texts_are_near_to_their_own_image():
    image, text = pairs(2000)
    measured = calibrated(image, text)
    assert measured is not None
    own = (image * text).sum(1)
    assert np.mean(own >= measured.near) == pytest.approx(0.95, abs=0.002)
    assert measured.own == pytest.approx(np.median(own)) and measured.random < measured.near < measured.own
    shifted = (image * np.roll(text, 1, 0)).sum(1).mean()
    assert measured.random == pytest.approx(shifted, abs=0.02)
    assert measured.images == pytest.approx((image * np.roll(image, 1, 0)).sum(1).mean(), abs=0.02)
    again = Calibration.read({"calibration": measured.to_json()})
    assert again == measured


def test_several_texts_of_an_image_are_no_random_pairs():
    image, text = pairs(40)
    doubled = calibrated(np.repeat(image, 2, 0), np.repeat(text, 2, 0))
    single = calibrated(image, text)
    assert doubled is not None and single is not None
    assert doubled.random == pytest.approx(single.random, abs=1e-5)


def test_too_few_or_equal_pictures_say_nothing():
    image, text = pairs(19)
    assert calibrated(image, text) is None
    assert calibrated(np.repeat(image[:1], 30, 0), np.repeat(text[:1], 30, 0)) is None
    for fields in (None, {}, {"calibration": "x"}, {"calibration": '{"random": 1}'}, {"calibration": "[]"}):
        assert Calibration.read(fields) is None
    assert Calibration(0.5, 0.5, 0.5, 0.9).relevance(0.5, by_text=True) is None


def test_all_pairs_are_drawn_with_equal_chance():
    image, text = pairs(5000)
    image[:2500, 0], image[2500:, 0] = 0, 1
    sample = PairSample(64, most=1000)
    for first in range(0, 5000, 700):
        sample.add(image[first : first + 700], text[first : first + 700])
    kept, _ = sample._rows
    assert len(kept) == 1000 and kept[:, 0].mean() == pytest.approx(0.5, abs=0.06)


def test_a_model_that_cannot_tell_says_nothing_of_nearness():
    image, text = pairs(400)
    good, weak = calibrated(image, text), calibrated(image, np.roll(text, 7, 0))
    assert good is not None and weak is not None
    assert good.reached < 0.05 and good.is_near(good.near) is True and good.is_near(good.near - 0.01) is False
    # Texts that are no nearer to their own images than to others.
    assert weak.reached > 0.5 and weak.is_near(0.99) is None and weak.relevance(0.99, by_text=True) is None
    older = Calibration.read({"calibration": '{"random": 0, "own": 0.5, "near": 0.4, "images": 0.2}'})
    assert older == Calibration(0, 0.5, 0.4, 0.2) and older.is_near(0.4) is True
