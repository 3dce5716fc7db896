"""The arms of bench/search_latency.py find the same items."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.search.made_items import OWN_ENGINE

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    if not BENCH.exists():
        pytest.skip("installed without its benchmarks")
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("search_latency")


@pytest.fixture
def rows_of(bench, tmp_path, monkeypatch):
    """Rows by arm, of arms that run in this process."""
    pytest.importorskip("chromadb")

    def in_process(o, arm, folder):
        return bench.run_arm(o, arm, bench.Data(folder, bench.limit(o, arm)))

    def rows_of(**options) -> dict[str, dict]:
        monkeypatch.setattr(bench, "in_own_process", in_process)
        bench.main(bench.Options(**options, out=tmp_path / "rows.jsonl"))
        return {row["arm"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}

    return rows_of


def test_all_arms_find_the_same_items(bench, rows_of, capsys, tmp_path):
    options = {"vectors": 600, "width": 32, "queries": 20, "candidates": 300, "bits": 64, "batch": 200}
    assert OWN_ENGINE.exists()
    options["server"] = f"numpy:{tmp_path}/index.npz"
    rows = rows_of(**options, arms=[arm for arm in bench.ARMS if arm != "http"])
    assert {"exact", "chroma", "ours", "server", "hash_random", "hash_learned"} <= {*rows}
    assert rows["ours"]["disk_bytes"] > 600 * 32 * 4 and rows["server"]["address"] == "numpy:"
    assert rows["exact"]["recall@10"] == 1 and all(row["recall@10"] > 0.95 for row in rows.values())
    assert rows["chroma"]["recall@10"] == pytest.approx(rows["ours"]["recall@10"], abs=0.02)
    assert rows["hash_random"]["floats_over_kept"] == 16
    for row in rows.values():
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["vectors"] == 600 and row["commit"]
    assert "600 x 32, 20 queries" in capsys.readouterr().out


@pytest.mark.slow
def test_the_service_finds_what_its_index_finds(rows_of, capsys):
    limit = {"engine": 300}
    rows = rows_of(vectors=500, width=32, queries=15, arms=("http", "engine", "exact"), batch=100, limit=limit)
    assert {name: row["vectors"] for name, row in rows.items()} == dict.fromkeys(rows, 300) | {"exact": 500}
    assert rows["http"]["recall@10"] == rows["search"]["recall@10"] > 0.95 and "recall@10" not in rows["model"]
    over = rows["http"]["p50_ms"] - rows["model"]["p50_ms"]
    assert rows["http"]["over_model_ms"] == pytest.approx(over) and rows["http"]["cpu_ms"] > 0
    assert f"{over:.2f} ms above the model's" in capsys.readouterr().out


def test_made_queries_have_a_mean_of_their_own(bench):
    image, text = bench.random_vectors(4000, 32, 1, "image"), bench.random_vectors(4000, 32, 2, "text")
    assert np.allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    apart = np.linalg.norm(image.mean(0) - text.mean(0))
    assert apart > 5 * np.linalg.norm(image[:2000].mean(0) - image[2000:].mean(0))
    assert np.array_equal(image, bench.random_vectors(4000, 32, 1, "image"))
