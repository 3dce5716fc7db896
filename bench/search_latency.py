"""Searching many vectors: recall, latency, build time and memory of each way to do it.

    python bench/search_latency.py                                # 100,000 made vectors of 256 numbers
    python bench/search_latency.py --vectors 1000000 --limit engine 300000 faiss 500000    # these on the first so many alone
    python bench/search_latency.py --embedded photos/vectors      # of `vlp embed`: images are searched by their captions

Arms: exact (a matrix product), chroma (the embedded engine called directly), ours (the same through our layer: their
queries take turns), http (the service, asked by text over a connection that stays open; in turns with it model, the
vector of that text alone, and search, our index by that vector), hash (codes as a prefilter, scored exactly), and faiss's
HNSW where it is installed, as a yardstick. Each is built in a process of its own, whose growth is its memory; queries come
one at a time. Made vectors have clusters in few of their dimensions and lie in a narrow cone, queries in another, as images
and texts do. The model behind http has random weights: its recall is of queries that no item is near to, and says little.
Results are appended to bench/results/search_latency.jsonl.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from random_service import made_export, made_texts, serving
from records import stamp
from rich.console import Console
from rich.table import Table

from fastvlp.errors import UserError
from fastvlp.search.embedded import open_embedded, read_part
from fastvlp.search.embedder import Embedder, fingerprint
from fastvlp.search.engines.interface import IndexEngine, Stamp, open_index
from fastvlp.search.hashing import HashSearch, learned_projection, random_projection

RESULTS = Path(__file__).parent / "results" / "search_latency.jsonl"
K = 10
CPU, TEXTS = "fastvlp_cpu_seconds_total", 'fastvlp_batch_wait_seconds_{}{{kind="texts"}}'
ARMS = ("exact", "engine", "http", "hash_random", "hash_learned", "faiss")
Arm = Literal["exact", "engine", "http", "hash_random", "hash_learned", "faiss"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """vectors, width, queries: of the made data. embedded: a folder of `vlp embed` instead. bits, candidates: of hash
    codes. batch: vectors of one addition. The arm engine times chroma and ours. limit: of an arm, vectors where it gets the
    first so many alone, as its rows then say; http searches what engine built."""

    vectors: int = 100_000
    width: int = 256
    queries: int = 500
    embedded: Path | None = None
    bits: int = 256
    candidates: int = 1000
    batch: int = 2000
    arms: tuple[Arm, ...] = ARMS
    limit: dict[Arm, int] = field(default_factory=dict)
    threads: int = 1
    out: Path = RESULTS


class Data:
    """Vectors and queries in files, which every arm's process opens without a copy in its memory. others: queries that are
    not asked, for their mean. texts: to ask a model by; the queries' own where there is a model to them."""

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder = folder
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")[:limit]
        self.texts = json.loads((folder / "texts.json").read_text())
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
        said = made_texts(o.queries, 3)
    else:
        parts = [read_part(path) for path in open_embedded(o.embedded).parts]
        vectors, texts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "text"))
        if not len(texts):
            raise UserError(f"{o.embedded}: has no texts to search by; embed records with captions")
        order = np.random.default_rng(0).permutation(len(texts))
        all_said = [text for part in parts for text in part.captions]
        texts, said = texts[order], [all_said[i] for i in order[: o.queries]]
    (folder / "texts.json").write_text(json.dumps(said))
    made_export(folder, said, vectors.shape[1])
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", texts[: o.queries])
    np.save(folder / "others.npy", texts[o.queries : 2 * o.queries])
    return Data(folder)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(searches: dict[str, Callable[[Any], list[int]]], queries: Sequence[Any] | np.ndarray) -> dict[str, dict]:
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


def additions(arm: str, o: Options, data: Data) -> Iterator[tuple[np.ndarray, list[str]]]:
    """The vectors and ids of each addition; how far the build is, now and then. A graph grows slower the larger it is: of
    the rest it says the least."""
    count, began, worked = len(data.vectors), time.perf_counter(), time.process_time()
    every = max(10_000, count // 20)
    for first in range(0, count, o.batch):
        rows = np.array(data.vectors[first : first + o.batch])
        done = first + len(rows)
        yield rows, [str(i) for i in range(first, done)]
        if done // every > first // every:
            passed, cpu = time.perf_counter() - began, time.process_time() - worked
            each = f"{1e4 * passed / done:.1f} s ({1e4 * cpu / done:.1f} s of CPU) each 10,000"
            left = f"at least {passed / done * (count - done) / 60:.0f} min more"
            print(f"{arm}: {done:,} of {count:,} vectors, {each}, {left}", flush=True)


def infos(ids: Sequence[str]) -> list[dict[str, str]]:
    return [{"caption": f"caption {id}", "source": "made"} for id in ids]


def ours(data: Data) -> IndexEngine:
    """An index that the service will open: it says that its vectors are of the export."""
    width = data.vectors.shape[1]
    return open_index(
        str(data.folder / "ours"), Stamp(fingerprint=fingerprint(data.folder / "export"), width=width), create=True
    )


def engine(o: Options, data: Data) -> dict[str, dict]:
    """Chroma directly, and our layer over it, each over a folder of its own, with the same graph."""
    import chromadb
    from chromadb.config import Settings

    from fastvlp.search.engines.chroma import GRAPH

    quiet = Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(data.folder / "chroma"), settings=quiet)
    collection = client.create_collection("items", embedding_function=None, configuration={"hnsw": GRAPH})
    index = ours(data)
    built, grown = {"chroma": 0.0, "ours": 0.0}, {"chroma": 0, "ours": 0}
    for turn, (rows, ids) in enumerate(additions("chroma and ours", o, data)):
        for name in ("chroma", "ours") if turn % 2 else ("ours", "chroma"):
            before, began = resident(), time.perf_counter()
            if name == "chroma":
                collection.upsert(ids=ids, embeddings=rows, metadatas=infos(ids))
            else:
                index.add(ids, rows, infos(ids))
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


def http(o: Options, data: Data) -> dict[str, dict]:
    """Of http, over_model_ms: its median above that of the model alone; waited_ms: mean time in which a text waited for
    others to share its batch; cpu_ms (a mean) and memory are the service's."""
    torch.set_num_threads(o.threads)
    embedder, index = Embedder.load(data.folder / "export", "cpu"), ours(data)
    if index.count() == 0:  # else the arm engine has filled it
        for rows, ids in additions("http", o, data):
            index.add(ids, rows, infos(ids))
    asked = embedder.texts(data.texts)
    vector = dict(zip(data.texts, asked))

    with serving(data.folder / "export", data.folder / "ours", o.threads) as client:

        def request(text: str) -> list[int]:
            answer = json.loads(client.ask("/v1/search", {"text": text, "limit": K}))
            return [int(hit["id"]) for hit in answer["results"]]

        def model(text: str) -> list[int]:
            embedder.texts([text])
            return []

        def search(text: str) -> list[int]:
            return [int(hit.id) for hit in index.search(vector[text][None], K)[0]]

        request(data.texts[0])  # the service loads its graph with the first search
        before = client.measured()
        found = timed({"http": request, "model": model, "search": search}, data.texts)
        after = client.measured()
    index.close()
    for row in found.values():
        del row["over_first"]  # of CPU times, and most of a request's is not this process's
    requests = after[TEXTS.format("count")] - before[TEXTS.format("count")]
    each = {name: 1e3 * (after[name] - before[name]) / requests for name in (CPU, TEXTS.format("sum"))}
    own = found["http"]["p50_ms"] - found["model"]["p50_ms"]
    found["http"] |= {
        "over_model_ms": own,
        "over_model_and_search_ms": own - found["search"]["p50_ms"],
        "cpu_ms": each[CPU],
        "waited_ms": each[TEXTS.format("sum")],
        "memory_bytes": after["fastvlp_resident_memory_bytes"],
    }
    return {name: row | {"asked": asked} for name, row in found.items()}


def hashed(o: Options, data: Data, kind: Literal["random", "learned"]) -> dict[str, dict]:
    """Vectors stay in the file."""
    before, began = resident(), time.perf_counter()
    vectors, width = data.vectors, data.vectors.shape[1]
    if kind == "random":
        projection = random_projection(width, o.bits, mean_E=np.array(vectors[::50]).mean(0))
    else:
        projection = learned_projection(vectors[:: max(1, len(vectors) // 20_000)], o.bits, rounds=20)
    index, mean = HashSearch(vectors, projection), data.others.mean(0) if len(data.others) else None
    built, grown = time.perf_counter() - began, resident() - before
    found = timed(
        {"hash": lambda query: index.search(query[None], K, o.candidates, mean_E=mean)[0][0].tolist()}, data.queries
    )
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
    for rows, _ in additions("faiss", o, data):
        index.add(rows)
    built, grown = time.perf_counter() - began, resident() - before
    found = timed({"faiss": lambda query: index.search(query[None], K)[1][0].tolist()}, data.queries)
    return {"faiss": found["faiss"] | {"build_s": built, "memory_bytes": grown}}


def run_arm(o: Options, arm: Arm, data: Data) -> dict[str, dict]:
    match arm:
        case "exact":
            return exact(o, data)
        case "engine":
            return engine(o, data)
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
            found = results.get(timeout=1)
            break
        except multiprocessing.queues.Empty:
            if child.exitcode is not None:
                raise SystemExit(f"arm {arm} ended with {child.exitcode}") from None
    child.join()
    return found


def best(queries_QE: np.ndarray, vectors: np.ndarray) -> list[set[int]]:
    parts = (queries_QE[first : first + 20] @ vectors.T for first in range(0, len(queries_QE), 20))
    return [{*row.tolist()} for score_QN in parts for row in np.argpartition(-score_QN, K, axis=1)[:, :K]]


def scored(row: dict, data: Data, vectors: np.ndarray) -> dict:
    """The row with its recall among these vectors, where it found any."""
    places, asked = row.pop("places"), row.pop("asked", data.queries)
    size = {"vectors": len(vectors), "width": vectors.shape[1], "queries": len(places)}
    if not any(places):
        return row | size
    shares = [len({*one} & right) / K for one, right in zip(places, best(asked, vectors))]
    return {"recall@10": float(np.mean(shares))} | row | size


def main(o: Options) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(o.threads)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(o, Path(folder))
        for arm in sorted(o.arms, key=ARMS.index):
            for name, row in in_own_process(o, arm, Path(folder)).items():
                rows.append({"arm": name} | scored(row, data, data.vectors[: limit(o, arm)]))
        show(rows, f"{len(data.vectors):,} x {data.vectors.shape[1]}, {len(data.queries)} queries one at a time")
    told = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(o).items() if name != "out"
    }
    o.out.parent.mkdir(parents=True, exist_ok=True)
    with o.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(stamp("cpu", "search_latency.py") | told | row) + "\n")


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    times = dict.fromkeys(("p50_ms", "p99_ms", "cpu_ms", "over_first"), ".2f")
    columns = {"vectors": ",", "recall@10": ".4f", **times, "build_s": ".1f"}
    for name in ("arm", *columns, "memory MB", "kept MB"):
        table.add_column(name.replace("_", " "), justify="left" if name == "arm" else "right")
    for row in rows:
        sizes = [f"{row[key] / 1e6:.0f}" if key in row else "-" for key in ("memory_bytes", "kept_bytes")]
        numbers = [format(row[name], told) if name in row else "-" for name, told in columns.items()]
        table.add_row(row["arm"], *numbers, *sizes)
    Console().print(table)
    for row in rows:
        if "over_model_ms" in row:
            over, both = row["over_model_ms"], row["over_model_and_search_ms"]
            print(f"http p50 is {over:.2f} ms above the model's, {both:.2f} ms above model and search")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
