"""Measure a running service under load: answers by status, latency, sizes of its batches, CPU time and memory.

    vlp serve EXPORT --index INDEX --port 8000
    python bench/service_load.py --data photos/test --seconds 180

Each of 64 clients sends its next request as soon as it has an answer: a search by text, a search by picture, or the vectors
of four texts, drawn by a hash of the client's number and turn. The service runs in a process of its own; its batches, CPU
time and memory are read from /metrics. Takes 1.1 times `--seconds`. A line is appended to bench/results/service_load.jsonl.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import tyro
from records import RESULTS, append, stamp

from fastvlp.data.records.shards import Shards

OUT = RESULTS / "service_load.jsonl"
# Captions and pictures to ask with.
Examples = list[tuple[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class Options:
    data: str
    """A split whose captions and pictures are used as queries."""
    address: str = "http://127.0.0.1:8000"
    """Address of the service."""
    clients: int = 64
    """Clients at once."""
    seconds: float = 60.0
    """Length of the measurement; a warm-up of a tenth of it comes before."""
    pictures: float = 0.25
    """Share of the requests that search by a picture."""
    vectors: float = 0.25
    """Share of the requests that ask for vectors of texts."""
    key: str = ""
    """Key of the service."""
    note: str = ""
    """Other work on the machine at the same time; saved with the result."""


@dataclass
class Measured:
    """Latencies in seconds by kind of request, answers by status, and the service's memory in MB over time."""

    latency: dict[str, list[float]] = field(default_factory=lambda: {"text": [], "picture": [], "vectors": []})
    status: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    counting: bool = False


async def client(number: int, o: Options, session: httpx.AsyncClient, examples: Examples, measured: Measured) -> None:
    """Sends one request after another until it is cancelled."""
    turn = 0
    while True:
        caption, picture = examples[(number * 7919 + turn * 104_729) % len(examples)]
        draw = (number * 2_654_435_761 + turn * 40_503) % 1000 / 1000
        turn += 1
        began = time.perf_counter()
        try:
            if draw < o.pictures:
                kind, response = "picture", await session.post("/v1/search", files={"image": picture})
            elif draw < o.pictures + o.vectors:
                texts = [examples[(number + turn + i) % len(examples)][0] for i in range(4)]
                kind, response = "vectors", await session.post("/v1/embeddings", json={"input": texts})
            else:
                kind, response = "text", await session.post("/v1/search", json={"text": caption})
            status = str(response.status_code)
        except httpx.HTTPError as error:
            kind, status = "text", type(error).__name__
        if measured.counting:
            measured.status[status] += 1
            measured.latency[kind].append(time.perf_counter() - began)


async def metrics(session: httpx.AsyncClient) -> dict[str, float]:
    """The numbers of /metrics, by name and labels."""
    text = (await session.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.M)}


async def run(o: Options, examples: Examples) -> dict[str, Any]:
    measured = Measured()
    headers = {"authorization": f"Bearer {o.key}"} if o.key else {}
    limits = httpx.Limits(max_connections=o.clients + 1, max_keepalive_connections=o.clients + 1)
    async with httpx.AsyncClient(base_url=o.address, headers=headers, limits=limits, timeout=60) as session:
        clients = [asyncio.create_task(client(i, o, session, examples, measured)) for i in range(o.clients)]
        await asyncio.sleep(o.seconds / 10)
        before, measured.counting = await metrics(session), True
        began = time.perf_counter()
        while (passed := time.perf_counter() - began) < o.seconds:
            measured.memory.append((await metrics(session))["fastvlp_resident_memory_bytes"] / 1e6)
            await asyncio.sleep(min(o.seconds / 20, max(0.0, o.seconds - passed)))
        after, measured.counting = await metrics(session), False
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return summary(measured, passed, before, after)


def summary(measured: Measured, passed: float, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """The result, from the measurements and /metrics before and after them. passed: seconds."""
    increase = {name: value - before.get(name, 0.0) for name, value in after.items()}

    def mean(kind: str, quantity: str) -> float:
        name = f'fastvlp_batch_{quantity}_{{}}{{{{kind="{kind}"}}}}'
        return round(increase[name.format("sum")] / increase[name.format("count")], 4)

    kinds = ("texts", "images", "search")
    requests, memory = sum(measured.status.values()), measured.memory
    return {
        "requests_per_s": round(requests / passed, 1),
        "status": dict(measured.status),
        # Unlike latency, this stays the same where other processes use the cores too.
        "server_cpu_ms_of_a_request": round(1000 * increase["fastvlp_cpu_seconds_total"] / requests, 2),
        "latency_ms": {kind: percentiles(seconds) for kind, seconds in measured.latency.items() if seconds},
        "rows_of_a_batch": {kind: mean(kind, "rows") for kind in kinds},
        "model_s_of_a_batch": {kind: mean(kind, "seconds") for kind in kinds},
        "memory_mb": {"first": round(memory[0]), "last": round(memory[-1]), "most": round(max(memory))},
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return {f"p{at}": round(1000 * cuts[at - 1], 1) for at in (50, 90, 99)}


def main(o: Options) -> None:
    shards = Shards(o.data)
    records = [shards.read(i) for i in range(min(len(shards), 500))]
    examples = [(str(record.info["captions"][0]), record.images[0]) for record in records]
    result = {
        "load": asyncio.run(run(o, examples)),
        "options": asdict(o) | {"key": ""},
        "about": stamp("cpu", "service_load.py"),
    }
    print(json.dumps(result["load"], indent=1))
    append(OUT, [result])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
