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
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from random_service import export_random_model, random_texts
from records import append, stamp
from rich.console import Console
from rich.table import Table
from search_arms import ARMS, Arm, Data, K, Options, run_arm

from fastvlp.errors import UserError
from fastvlp.search.embedded import open_embedded, read_part


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
