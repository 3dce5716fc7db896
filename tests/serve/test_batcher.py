"""Batches form by length in one thread, the queue is limited, and a bad input fails alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.serve.batcher import Batcher, BatchRun, InputError, Lane, choose_rows
from fastvlp.serve.limits import Refusal


class Model:
    """Doubles numbers when it is let; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_run = threading.Event()
        self.running = threading.Event()
        self.threads: set[int] = set()

    def __call__(self, items: list[int]) -> list[int]:
        self.threads.add(threading.get_ident())
        self.batches.append(items)
        self.running.set()
        assert self.may_run.wait(10)
        for row, item in enumerate(items):
            if item == 13:
                raise InputError(row, "unlucky")
            if item < 0:
                raise RuntimeError("broken")
        return [2 * item for item in items]


async def started(model: Model, batcher: Batcher) -> asyncio.Task[list[Any]]:
    """A request that occupies the model, so that the next ones wait together."""
    first = asyncio.create_task(batcher.submit("a", [0]))
    await asyncio.to_thread(model.running.wait, 10)
    return first


async def crowded(model: Model, batcher: Batcher) -> None:
    """Leaves behind a batch of two requests, so that the next ones are expected to have company."""
    first = await started(model, batcher)
    two = [asyncio.create_task(batcher.submit("a", [0])) for _ in range(2)]
    await asyncio.sleep(0)
    model.may_run.set()
    await asyncio.gather(first, *two)


def together(*requests: Sequence[int], budget: int = 100, max_waiting: int = 100) -> tuple[list[Any], Model]:
    """The answers (or errors) of requests that all came while the model was busy."""

    async def play() -> list[Any]:
        first = await started(model, batcher)
        tasks = [asyncio.create_task(batcher.submit("a", items)) for items in requests]
        await asyncio.sleep(0)
        model.may_run.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        return answers

    model = Model()
    batcher = Batcher({"a": Lane(run=model, budget=budget)}, window_s=0.0, max_waiting=max_waiting)
    try:
        return asyncio.run(play()), model
    finally:
        batcher.close()


def test_waiting_requests_share_a_batch_in_one_thread():
    answers, model = together([1], [2, 3], [4])
    assert answers == [[2], [4, 6], [8]]
    assert model.batches == [[0], [1, 2, 3, 4]]
    assert len(model.threads) == 1


def test_a_budget_splits_batches_in_order():
    answers, model = together([1, 2, 3], [4, 5], budget=2)
    assert answers == [[2, 4, 6], [8, 10]]
    assert model.batches == [[0], [1, 2], [3, 4], [5]]


def test_a_bad_input_fails_alone():
    answers, model = together([1], [2, 13], [3])
    assert answers[0] == [2] and answers[2] == [6]
    assert isinstance(answers[1], InputError) and answers[1].row == 1 and answers[1].reason == "unlucky"
    assert model.batches[1:] == [[1, 2, 13, 3], [1, 2, 3]]


def test_an_error_of_the_model_reaches_all_requests_of_its_batch():
    answers, _ = together([1], [-1])
    assert [type(answer) for answer in answers] == [RuntimeError, RuntimeError]


def test_the_number_of_waiting_inputs_is_limited():
    answers, _ = together([1, 2], [3], [4], max_waiting=3)
    assert answers[:2] == [[2, 4], [6]]
    assert isinstance(answers[2], Refusal) and answers[2].status == 503 and answers[2].retry_s


def test_a_cancelled_request_is_not_run():
    async def play() -> None:
        first = await started(model, batcher)
        gone = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        second = asyncio.create_task(batcher.submit("a", [2]))
        await asyncio.sleep(0)
        model.may_run.set()
        assert await first == [0] and await second == [4]
        assert batcher.waiting == 0

    model = Model()
    batcher = Batcher({"a": Lane(run=model, budget=9)}, window_s=0.0)
    asyncio.run(play())
    batcher.close()
    assert model.batches == [[0], [2]]


def test_a_window_gathers_requests():
    async def play() -> list[Any]:
        await crowded(model, batcher)
        return await asyncio.gather(*(batcher.submit("a", [i]) for i in range(4)))

    seen: list[BatchRun] = []
    model = Model()
    batcher = Batcher({"a": Lane(run=model, budget=100)}, window_s=0.1, on_batch=seen.append)
    assert asyncio.run(play()) == [[0], [2], [4], [6]]
    batcher.close()
    assert [(ran.lane, ran.rows) for ran in seen] == [("a", 1), ("a", 2), ("a", 4)] and seen[2].waited_s >= 0.1


def test_one_request_after_another_does_not_wait_for_the_window():
    async def play() -> list[Any]:
        # Several inputs of one request are no company.
        return [await batcher.submit(lane, [i, i]) for i, lane in enumerate("aab")]

    batcher = Batcher({lane: Lane(run=list, budget=9) for lane in "ab"}, window_s=9999.0)
    assert asyncio.run(asyncio.wait_for(play(), 20)) == [[0, 0], [1, 1], [2, 2]]
    batcher.close()


def test_a_full_batch_does_not_wait_for_the_window():
    async def play() -> list[Any]:
        await crowded(model, batcher)
        tasks = [asyncio.create_task(batcher.submit("a", [i])) for i in range(3)]
        answers = await asyncio.wait_for(asyncio.gather(*tasks[:2]), 20)
        assert not tasks[2].done()
        tasks[2].cancel()
        return answers

    model = Model()
    batcher = Batcher({"a": Lane(run=model, budget=2)}, window_s=9999.0)
    assert asyncio.run(play()) == [[0], [2]]
    batcher.close()


def test_lanes_do_not_mix_and_the_oldest_goes_first():
    async def play() -> list[Any]:
        first = await started(model, batcher)
        tasks = [asyncio.create_task(batcher.submit(lane, [i])) for i, lane in enumerate("bab", 1)]
        await asyncio.sleep(0)
        model.may_run.set()
        await first
        return await asyncio.gather(*tasks)

    model = Model()
    batcher = Batcher({"a": Lane(run=model, budget=9), "b": Lane(run=model, budget=9)}, window_s=0.0)
    assert asyncio.run(play()) == [[2], [4], [6]]
    batcher.close()
    assert model.batches == [[0], [1, 3], [2]]


def test_closing_refuses_waiting_requests():
    async def play() -> Any:
        await started(model, batcher)
        waits = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.05)
        model.may_run.set()
        await closing
        with pytest.raises(Refusal, match="stopping"):
            await waits
        with pytest.raises(Refusal, match="stopping"):
            await batcher.submit("a", [2])

    model = Model()
    batcher = Batcher({"a": Lane(run=model, budget=9)}, window_s=0.0)
    asyncio.run(play())
    assert not batcher.alive


def test_neighbours_in_length_share_a_batch():
    assert choose_rows([5, 60, 6, 4, 61], budget=20) == [0, 2, 3]
    assert choose_rows([60, 5, 6, 4, 61], budget=122) == [0, 4]
    assert choose_rows([7], budget=1) == [0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 400))
def test_a_batch_holds_the_oldest_and_stays_in_its_budget(lengths: list[int], budget: int):
    chosen = choose_rows(lengths, budget)
    picked = [lengths[i] for i in chosen]
    assert 0 in chosen and chosen == sorted(set(chosen))
    assert len(chosen) == 1 or len(chosen) * max(picked) <= budget
    left_out = [lengths[i] for i in range(len(lengths)) if i not in chosen]
    assert not [n for n in left_out if min(picked) < n < max(picked)], "a batch has no hole in its lengths"
