"""Searching many vectors: recall, latency, build time and memory of each way to do it.

    python bench/retrieval.py                                # 100,000 made vectors of 256 numbers
    python bench/retrieval.py --vectors 1000000
    python bench/retrieval.py --embedded photos/vectors      # of `vlp embed`: images are searched by their captions

Arms: exact (a matrix product), chroma (the embedded engine called directly), ours (the same through our layer: their
queries take turns), hash (codes as a prefilter, scored exactly), and faiss's HNSW where it is installed, as a yardstick.
Each is built in a process of its own, whose growth is its memory; queries come one at a time. Made vectors have clusters
in few of their dimensions and lie in a narrow cone, queries in another, as images and texts do. Results are appended to
bench/results/retrieval.jsonl.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from objectives import stamp
from rich.console import Console
from rich.table import Table

from fastvlp.errors import UserError
from fastvlp.serve.bulk import open_embedded, read_part
from fastvlp.serve.hashing import HashSearch, learned_projection, random_projection
from fastvlp.serve.index import Stamp, open_index

RESULTS = Path(__file__).parent / "results" / "retrieval.jsonl"
K = 10
ARMS = ("exact", "engine", "hash_random", "hash_learned", "faiss")
Arm = Literal["exact", "engine", "hash_random", "hash_learned", "faiss"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """vectors, width, queries: of the made data. embedded: a folder of `vlp embed` instead. bits, candidates: of hash
    codes. batch: vectors of one addition. The arm engine times chroma and ours."""

    vectors: int = 100_000
    width: int = 256
    queries: int = 500
    embedded: Path | None = None
    bits: int = 256
    candidates: int = 1000
    batch: int = 2000
    arms: tuple[Arm, ...] = ARMS
    threads: int = 1
    out: Path = RESULTS


class Data:
    """Vectors and queries in files, which every arm's process opens without a copy in its memory. others: queries that are
    not asked, for their mean."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self.queries = np.load(folder / "queries.npy")
        self.others = np.load(folder / "others.npy")


def made(number: int, width: int, seed: int, kind: Literal["image", "text"]) -> np.ndarray:
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
        vectors, texts = made(o.vectors, o.width, 1, "image"), made(2 * o.queries, o.width, 2, "text")
    else:
        parts = [read_part(path) for path in open_embedded(o.embedded).parts]
        vectors, texts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "text"))
        if not len(texts):
            raise UserError(f"{o.embedded}: has no texts to search by; embed records with captions")
        texts = texts[np.random.default_rng(0).permutation(len(texts))]
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", texts[: o.queries])
    np.save(folder / "others.npy", texts[o.queries : 2 * o.queries])
    return Data(folder)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(searches: dict[str, Callable[[np.ndarray], list[int]]], queries: np.ndarray) -> dict[str, dict]:
    """Each query in turn by each search, which take turns in being first, after the first tenth to warm up. over_first: of
    the first search, the median of each query's ratios in CPU time, which a busy machine does not stretch."""
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
            found = searches[name](query)
            cpu[name].append(time.process_time() - worked)
            seconds[name].append(time.perf_counter() - began)
            places[name].append(found)
    return {
        name: {
            "p50_ms": float(np.percentile(seconds[name], 50)) * 1e3,
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
    built, grown = time.perf_counter() - began, resident() - before

    def search(query: np.ndarray) -> list[int]:
        score = vectors @ query
        best = np.argpartition(-score, K)[:K]
        return best[np.argsort(-score[best])].tolist()

    found = timed({"exact": search}, data.queries)
    return {"exact": found["exact"] | {"build_s": built, "memory_bytes": grown, "kept_bytes": vectors.nbytes}}


def engine(o: Options, data: Data) -> dict[str, dict]:
    """Chroma directly, and our layer over it, each over a folder of its own, with the same graph."""
    import chromadb
    from chromadb.config import Settings

    from fastvlp.serve.chroma import GRAPH

    count, width = data.vectors.shape
    quiet = Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(data.folder / "chroma"), settings=quiet)
    collection = client.create_collection("items", embedding_function=None, configuration={"hnsw": GRAPH})
    index = open_index(str(data.folder / "ours"), Stamp(fingerprint="made", width=width), create=True)
    built, grown = {"chroma": 0.0, "ours": 0.0}, {"chroma": 0, "ours": 0}
    for first in range(0, count, o.batch):
        rows = np.array(data.vectors[first : first + o.batch])
        ids = [str(i) for i in range(first, first + len(rows))]
        infos = [{"caption": f"caption {i}", "source": "made"} for i in ids]
        for name in ("chroma", "ours") if first // o.batch % 2 else ("ours", "chroma"):
            before, began = resident(), time.perf_counter()
            if name == "chroma":
                collection.upsert(ids=ids, embeddings=rows, metadatas=infos)
            else:
                index.add(ids, rows, infos)
            built[name] += time.perf_counter() - began
            grown[name] += resident() - before

    def direct(query: np.ndarray) -> list[int]:
        told = collection.query(query_embeddings=query[None], n_results=K, include=["metadatas", "distances"])
        return [int(id) for id in told["ids"][0]]

    def layered(query: np.ndarray) -> list[int]:
        return [int(hit.id) for hit in index.search(query[None], K)[0]]

    found = timed({"chroma": direct, "ours": layered}, data.queries)
    index.close()
    return {name: row | {"build_s": built[name], "memory_bytes": grown[name]} for name, row in found.items()}


def hashed(o: Options, data: Data, kind: Literal["random", "learned"]) -> dict[str, dict]:
    """Vectors stay in the file."""
    before, began = resident(), time.perf_counter()
    vectors, width = data.vectors, data.vectors.shape[1]
    if kind == "random":
        projection = random_projection(width, o.bits, mean_E=np.array(vectors[::50]).mean(0))
    else:
        projection = learned_projection(vectors[:: max(1, len(vectors) // 20_000)], o.bits, rounds=20)
    index = HashSearch(vectors, projection, data.others.mean(0) if len(data.others) else None)
    built, grown = time.perf_counter() - began, resident() - before
    found = timed({"hash": lambda query: index.search(query[None], K, o.candidates)[0][0].tolist()}, data.queries)
    told = {"build_s": built, "memory_bytes": grown, "kept_bytes": index.code_WN.nbytes}
    return {f"hash_{kind}": found["hash"] | told | {"floats_over_kept": vectors.nbytes / index.code_WN.nbytes}}


def faiss_hnsw(o: Options, data: Data) -> dict[str, dict]:
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(o.threads)
    before, began = resident(), time.perf_counter()
    index = faiss.IndexHNSWFlat(data.vectors.shape[1], 24, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 128, 128
    index.add(np.array(data.vectors))
    built, grown = time.perf_counter() - began, resident() - before
    found = timed({"faiss": lambda query: index.search(query[None], K)[1][0].tolist()}, data.queries)
    return {"faiss": found["faiss"] | {"build_s": built, "memory_bytes": grown}}


def run_arm(o: Options, arm: Arm, data: Data) -> dict[str, dict]:
    match arm:
        case "exact":
            return exact(o, data)
        case "engine":
            return engine(o, data)
        case "faiss":
            return faiss_hnsw(o, data)
        case _:
            return hashed(o, data, "random" if arm == "hash_random" else "learned")


def one_arm(o: Options, arm: Arm, folder: Path, results: multiprocessing.Queue) -> None:
    results.put(run_arm(o, arm, Data(folder)))


def in_own_process(o: Options, arm: Arm, folder: Path) -> dict[str, dict]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=one_arm, args=(o, arm, folder, results))
    child.start()
    while True:
        try:
            found = results.get(timeout=1)
            break
        except multiprocessing.queues.Empty:
            if child.exitcode is not None:
                raise SystemExit(f"arm {arm} ended with {child.exitcode}") from None
    child.join()
    return found


def best(data: Data) -> list[set[int]]:
    score_QN = data.queries @ np.array(data.vectors).T
    return [{*row.tolist()} for row in np.argpartition(-score_QN, K, axis=1)[:, :K]]


def main(o: Options) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(o.threads)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(o, Path(folder))
        wanted = best(data)
        size = {"vectors": len(data.vectors), "width": data.vectors.shape[1], "queries": len(data.queries)}
        for arm in o.arms:
            for name, row in in_own_process(o, arm, Path(folder)).items():
                found = row.pop("places")
                share = np.mean([len({*one} & right) / K for one, right in zip(found, wanted)])
                rows.append({"arm": name, "recall@10": float(share), **row, **size})
    table = Table(title=f"{size['vectors']:,} x {size['width']}, {size['queries']} queries one at a time")
    columns = {
        "recall@10": ".4f",
        "p50_ms": ".2f",
        "p99_ms": ".2f",
        "cpu_ms": ".2f",
        "over_first": ".2f",
        "build_s": ".1f",
    }
    for name in ("arm", *columns, "memory MB", "kept MB"):
        table.add_column(name.replace("_", " "), justify="left" if name == "arm" else "right")
    for row in rows:
        sizes = [f"{row[key] / 1e6:.0f}" if key in row else "-" for key in ("memory_bytes", "kept_bytes")]
        table.add_row(row["arm"], *(format(row[name], told) for name, told in columns.items()), *sizes)
    Console().print(table)
    told = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(o).items() if name != "out"
    }
    o.out.parent.mkdir(parents=True, exist_ok=True)
    with o.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(stamp("cpu", "retrieval.py") | told | row) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
