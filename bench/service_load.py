"""Many clients at once: what the service answers, how soon, and in which batches.

    vlp serve EXPORT --index INDEX --port 8000
    python bench/service_load.py --data photos/test --seconds 180

Each client of 64 asks for the next thing as soon as it has its answer: a search by text, a search by picture, or the
vectors of four texts, by a hash of its number and turn. The service runs in a process of its own; its batches and its
memory are read from /metrics. A line is appended to bench/results/service_load.jsonl.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tyro
from records import stamp

from fastvlp.data.records.shards import Shards

RESULTS = Path(__file__).parent / "results" / "service_load.jsonl"


@dataclass(frozen=True, kw_only=True)
class Options:
    """data: a split whose captions and pictures are asked for. pictures: share of the requests. seconds: after a warm-up
    of a tenth of it. vectors: share that asks for vectors. note: what else ran on the machine."""

    data: str
    address: str = "http://127.0.0.1:8000"
    clients: int = 64
    seconds: float = 60.0
    pictures: float = 0.25
    vectors: float = 0.25
    key: str = ""
    note: str = ""


@dataclass
class Seen:
    """Latencies by what was asked, answers by status, and the service's memory over time."""

    latency: dict[str, list[float]] = field(default_factory=lambda: {"text": [], "picture": [], "vectors": []})
    status: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    counting: bool = False


async def client(
    number: int, told: Options, session: httpx.AsyncClient, things: list[tuple[str, bytes]], seen: Seen
) -> None:
    turn = 0
    while True:
        caption, picture = things[(number * 7919 + turn * 104_729) % len(things)]
        drawn = (number * 2_654_435_761 + turn * 40_503) % 1000 / 1000
        turn += 1
        began = time.perf_counter()
        try:
            if drawn < told.pictures:
                kind, answer = "picture", await session.post("/v1/search", files={"image": picture})
            elif drawn < told.pictures + told.vectors:
                texts = [things[(number + turn + i) % len(things)][0] for i in range(4)]
                kind, answer = "vectors", await session.post("/v1/embeddings", json={"input": texts})
            else:
                kind, answer = "text", await session.post("/v1/search", json={"text": caption})
            status = str(answer.status_code)
        except httpx.HTTPError as error:
            kind, status = "text", type(error).__name__
        if seen.counting:
            seen.status[status] += 1
            seen.latency[kind].append(time.perf_counter() - began)


async def metrics(session: httpx.AsyncClient) -> dict[str, float]:
    text = (await session.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.M)}


async def play(told: Options, things: list[tuple[str, bytes]]) -> dict[str, Any]:
    seen = Seen()
    headers = {"authorization": f"Bearer {told.key}"} if told.key else {}
    limits = httpx.Limits(max_connections=told.clients + 1, max_keepalive_connections=told.clients + 1)
    async with httpx.AsyncClient(base_url=told.address, headers=headers, limits=limits, timeout=60) as session:
        clients = [asyncio.create_task(client(i, told, session, things, seen)) for i in range(told.clients)]
        await asyncio.sleep(told.seconds / 10)
        before, seen.counting = await metrics(session), True
        began = time.perf_counter()
        while (passed := time.perf_counter() - began) < told.seconds:
            seen.memory.append((await metrics(session))["fastvlp_resident_memory_bytes"] / 1e6)
            await asyncio.sleep(min(told.seconds / 20, max(0.0, told.seconds - passed)))
        after, seen.counting = await metrics(session), False
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return summary(seen, passed, before, after)


def summary(seen: Seen, passed: float, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}

    def mean(kind: str, what: str) -> float:
        name = f'fastvlp_batch_{what}_{{}}{{{{kind="{kind}"}}}}'
        return round(grown[name.format("sum")] / grown[name.format("count")], 4)

    kinds = ("texts", "images", "search")
    return {
        "requests_per_s": round(sum(seen.status.values()) / passed, 1),
        "status": dict(seen.status),
        # Where others use the cores too, this is what stays the same.
        "server_cpu_ms_of_a_request": round(1000 * grown["fastvlp_cpu_seconds_total"] / sum(seen.status.values()), 2),
        "latency_ms": {kind: percentiles(times) for kind, times in seen.latency.items() if times},
        "rows_of_a_batch": {kind: mean(kind, "rows") for kind in kinds},
        "model_s_of_a_batch": {kind: mean(kind, "seconds") for kind in kinds},
        "memory_mb": {"first": round(seen.memory[0]), "last": round(seen.memory[-1]), "most": round(max(seen.memory))},
    }


def percentiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100) if len(times) > 1 else times * 99
    return {f"p{at}": round(1000 * cuts[at - 1], 1) for at in (50, 90, 99)}


def main(told: Options) -> None:
    shards = Shards(told.data)
    records = [shards.read(i) for i in range(min(len(shards), 500))]
    things = [(str(record.info["captions"][0]), record.images[0]) for record in records]
    result = {
        "load": asyncio.run(play(told, things)),
        "options": asdict(told) | {"key": ""},
        "about": stamp("cpu", "service_load.py"),
    }
    print(json.dumps(result["load"], indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
