"""Recall against the evaluations of ALBEF and open_clip, from a given score matrix."""

from __future__ import annotations

import math

import pytest

from fastvlp.eval.ranks import ranks, recall
from tests.golden import load

CONFIG, TOLERANCE, _, KNOWN = load("metrics_retrieval")


def mine(score, image_of_text, block):
    return recall(*ranks(lambda i, t: score[i, t], image_of_text, len(score), block=block))


def check(mine: float, name: str) -> None:
    assert mine == pytest.approx(float(KNOWN[name]), abs=TOLERANCE[name]), name


@pytest.mark.parametrize("block", [5, 4096])
def test_several_captions_an_image(block):
    found = mine(KNOWN["in.scores"], KNOWN["in.txt2img"], block)
    for theirs, ours in (("txt", "image_to_text"), ("img", "text_to_image")):
        for k in (1, 5, 10):
            check(100 * found[f"{ours}/r{k}"], f"out.{theirs}_r{k}")
    check(100 * found["recall"], "out.r_mean")


@pytest.mark.parametrize("block", [5, 4096])
def test_one_caption_an_image(block):
    image_of_text = KNOWN["in.txt2img"]
    first = [int((image_of_text == i).nonzero()[0, 0]) for i in range(CONFIG["I"])]
    found = mine(KNOWN["in.scores"][:, first], image_of_text[first], block)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            check(found[f"{direction}/r{k}"], f"out.square.{direction}_R@{k}")
        check(found[f"{direction}/mean_rank"], f"out.square.{direction}_mean_rank")
        # The official code floors the median.
        check(math.floor(found[f"{direction}/median_rank"]), f"out.square.{direction}_median_rank")
