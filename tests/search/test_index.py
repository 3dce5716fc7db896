"""The same tests for every index engine: a folder, a Chroma server on loopback, PostgreSQL where there is one, Qdrant's engine
behind a server that speaks as Qdrant's does, and the engine of docs/guide/own-parts.md."""

import subprocess
import sys
import time
import uuid
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest

from fastvlp.errors import UserError
from fastvlp.search.calibration import Calibration
from fastvlp.search.engines.interface import open_index
from tests.installed import skip_without
from tests.search.made_items import STAMP, fill, made_vectors, vector_of

skip_without("chromadb", install="-e '.[serve]'")


@pytest.fixture(params=["folder", "server", "postgresql", "qdrant", "own"])
def uri(request, tmp_path):
    """Where an index may be made."""
    if request.param == "folder":
        return str(tmp_path / "index")
    if request.param == "own":
        return f"numpy:{tmp_path}/index.npz"
    name = f"t{uuid.uuid4().hex[:16]}"
    if request.param == "server":
        return f"{request.getfixturevalue('chroma_server')}/{name}"
    if request.param == "qdrant":
        return f"{request.getfixturevalue('qdrant')}/{name}"
    return f"{request.getfixturevalue('postgres')}#{name}"


@pytest.fixture
def index(uri):
    index = open_index(uri, STAMP, create=True)
    yield index
    index.close()


def test_search_returns_the_nearest_items_with_cosines(index):
    vectors = fill(index)
    query = made_vectors(3, seed=1)
    exact = query @ vectors.T
    for row, hits in zip(exact, index.search(query, 5)):
        order = np.argsort(-row)[:5]
        assert [hit.id for hit in hits] == [f"i{i}" for i in order]
        assert np.allclose([hit.score for hit in hits], row[order], atol=1e-5)
        assert hits[0].info == {"n": order[0], "even": bool(order[0] % 2 == 0)}
    assert index.search(made_vectors(0), 5) == [] and index.count() == 50


def test_pages_continue_each_other(index):
    fill(index)
    query = made_vectors(1, seed=1)
    whole = index.search(query, 20)[0]
    assert index.search(query, 7, offset=13)[0] == whole[13:]
    assert index.search(query, 7, offset=48)[0] == index.search(query, 60)[0][48:]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({"n": 3}, {3}),
        ({"n": [3, 4, 99]}, {3, 4}),
        ({"n": [3, 4], "even": True}, {4}),
        ({"n": [3, "four"]}, {3}),
        ({"n": []}, set()),
        ({"unknown": 1}, set()),
        ({"name": "红色'\"; drop table"}, {50}),
    ],
)
def test_filters_take_a_value_or_a_list_of_values(index, where, wanted):
    fill(index)
    index.add(["odd one"], made_vectors(1, seed=9), [{"name": "红色'\"; drop table"}])
    hits = index.search(made_vectors(1, seed=1), 10, where)[0]
    assert {hit.info.get("n", 50) for hit in hits} == wanted


def test_adding_an_item_again_replaces_it(index):
    vectors = fill(index)
    index.add(["i1", "new"], vectors[[7, 8]], [{"other": "x"}, {}])
    items = index.get(["new", "i1", "nobody", "i1"])
    assert [(item.id, item.info) for item in items] == [("new", {}), ("i1", {"other": "x"})]
    assert np.allclose(items[1].vector, vectors[7], atol=1e-6) and items[1].vector.dtype == np.float32
    assert index.count() == 51


def test_deleted_items_are_gone_and_counted_once(index):
    vectors = fill(index)
    assert index.delete(["i1", "i2", "i1", "nobody"]) == 2
    assert index.delete(["i1"]) == 0 and index.count() == 48
    assert index.search(vectors[[1]], 1)[0][0].id != "i1" and index.get(["i1"]) == []
    index.add(["i1"], vectors[[1]], [{}])
    assert index.search(vectors[[1]], 1)[0][0].id == "i1"
    impossible = ["a\0b", "\ud800"]
    assert index.get([*impossible, "i1"])[0].id == "i1" and index.delete(impossible) == 0


def test_an_index_keeps_its_items_and_stamp(uri):
    index = open_index(uri, STAMP, create=True)
    vectors = fill(index)
    index.close()
    again = open_index(uri)
    assert again.stamp == STAMP and again.count() == 50
    assert again.search(vectors[[4]], 1)[0][0].id == "i4"
    again.close()


def test_an_index_keeps_what_its_cosines_mean(index, uri):
    calibration = Calibration(0.1, 0.5, 0.25, 0.125)
    assert index.calibration() is None
    if index.calibrate(calibration):
        fill(index)
        index.close()
        again = open_index(uri, STAMP)
        assert again.calibration() == calibration and again.stamp == STAMP and again.count() == 50
        again.close()
    else:
        assert uri.startswith("numpy:")


def test_another_model_is_refused(uri):
    open_index(uri, STAMP, create=True).close()
    for other in (replace(STAMP, fingerprint="0" * 32), replace(STAMP, width=8)):
        for create in (False, True):
            with pytest.raises(UserError, match="vectors of another model, made"):
                open_index(uri, replace(other, model="other"), create=create)
    open_index(uri, replace(STAMP, model="renamed"), create=True).close()


def test_opening_does_not_create_an_index(uri, tmp_path):
    with pytest.raises(UserError, match="no index here"):
        open_index(uri, STAMP)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("ids", "vectors", "infos", "words"),
    [
        (["a"], np.zeros((1, 8), np.float32), [{}], r"shape \[1, 8\].*16 dimensions"),
        (["a"], np.full((1, 16), np.nan), [{}], "not finite"),
        (["a", "a"], made_vectors(2), [{}, {}], "same id"),
        (["a"], made_vectors(1), [], "one of each"),
        ([""], made_vectors(1), [{}], "not empty"),
        (["a\0"], made_vectors(1), [{}], "Unicode"),
        (["a\ud800"], made_vectors(1), [{}], "Unicode"),
        (["a"], made_vectors(1), [{"x": None}], "field 'x' is None"),
        (["a"], made_vectors(1), [{"x": 2**70}], "a finite number"),
        (["a"], made_vectors(1), [{"x": float("inf")}], "a finite number"),
        (["a"], made_vectors(1), [{"$and": 1}], "does not begin with"),
    ],
)
def test_items_that_an_index_cannot_hold_are_refused(index, ids, vectors, infos, words):
    with pytest.raises(UserError, match=words):
        index.add(ids, vectors, infos)
    assert index.count() == 0


@pytest.mark.parametrize(
    ("k", "offset", "where"), [(0, 0, None), (1, -1, None), (10**9, 0, None), (1, 0, {"$or": 1}), (1, 0, {"a": [None]})]
)
def test_impossible_searches_are_refused(index, k, offset, where):
    with pytest.raises(UserError):
        index.search(made_vectors(1), k, where, offset)


def test_many_items_at_once(index, uri, monkeypatch):
    number = 4500  # more than one request of any engine
    if uri.startswith("qdrant:"):  # the server that stands in for it is slow
        monkeypatch.setattr("fastvlp.search.engines.qdrant.CHUNK", 100)
        number = 250
    vectors = np.tile(made_vectors(1), (number, 1))
    ids = [f"many/{i}" for i in range(number)]
    index.add(ids, vectors, [{"n": i} for i in range(number)])
    assert index.count() == number and [item.id for item in index.get(ids[::-1])] == ids[::-1]
    most = number * 14 // 15
    assert index.delete(ids[:most]) == most and index.count() == number - most


def kill_while_adding(uri, batches, size=20):
    """How many batches were acknowledged before the process was killed."""
    command = [sys.executable, "-m", "tests.search.made_items", uri, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = -1
        for line in child.stdout:
            acknowledged = int(line) if line.strip().isdigit() else acknowledged
            if acknowledged >= batches:
                break
        time.sleep(0.007)  # into the next batch
        child.kill()
        # What it printed before it died counts too.
        printed = [int(line) for line in child.stdout if line.strip().isdigit()]
    return max([acknowledged, *printed]) + 1


@pytest.mark.slow
def test_killing_the_writer_loses_no_acknowledged_item(uri):
    open_index(uri, STAMP, create=True).close()
    batches = kill_while_adding(uri, batches=3)
    with_all = open_index(uri, STAMP)
    ids = [f"i{i}" for i in range(20 * batches)]
    items = with_all.get(ids)
    assert [item.id for item in items] == ids
    assert all(
        item.info == {"n": i} and np.allclose(item.vector, vector_of(i), atol=1e-6) for i, item in enumerate(items)
    )
    last = 20 * batches - 1
    assert with_all.search(vector_of(last)[None], 1)[0][0].id == f"i{last}"
    # Of the batch that was cut short, items are there or not; added again, nothing is there twice.
    numbers = range(20 * (batches + 1))
    with_all.add([f"i{i}" for i in numbers], np.stack([vector_of(i) for i in numbers]), [{"n": i} for i in numbers])
    assert with_all.count() == len(numbers)
    hits = with_all.search(vector_of(5)[None], len(numbers))[0]
    assert len({hit.id for hit in hits}) == len(hits) == len(numbers)
    with_all.close()


@pytest.mark.parametrize("width", [2000, 2048])
def test_postgresql_uses_its_graph_for_wide_vectors(postgres, width, monkeypatch):
    uri = f"{postgres}#t{uuid.uuid4().hex[:16]}"
    drawn = np.random.default_rng(0).normal(size=(30, width)).astype(np.float32)
    vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    index = open_index(uri, replace(STAMP, width=width), create=True)
    index.add([f"i{i}" for i in range(30)], vectors, [{}] * 30)
    index.close()
    again = open_index(uri)
    hits = again.search(vectors[[4]], 30)[0]
    assert [hit.id for hit in hits] == [f"i{i}" for i in np.argsort(-(vectors @ vectors[4]))]
    assert np.allclose([hit.score for hit in hits], np.sort(vectors @ vectors[4])[::-1], atol=1e-5)
    monkeypatch.setattr(type(again), "small", 0)
    assert [hit.id for hit in again.search(vectors[[4]], 30)[0]] == [hit.id for hit in hits]
    queries, execute = [], again._connection.execute
    monkeypatch.setattr(again._connection, "execute", lambda *query: (queries.append(query), execute(*query))[1])
    again.search(vectors[[4]], 5)
    execute("SET enable_seqscan = off")  # which is what the planner would do for thirty rows
    plan = str(execute(f"EXPLAIN {queries[-1][0]}", queries[-1][1]).fetchall())
    assert "Index Scan using" in plan and "vector_idx" in plan
    again.close()


def test_a_table_of_before_there_were_copies_is_upgraded(postgres, monkeypatch):
    name = f"t{uuid.uuid4().hex[:16]}"
    index = open_index(f"{postgres}#{name}", STAMP, create=True)
    vectors = fill(index)
    index._connection.execute(f"ALTER TABLE {name} DROP COLUMN same, DROP COLUMN copy")
    index._connection.execute(f"CREATE INDEX ON {name} USING hnsw ((vector::vector(16)) vector_ip_ops)")
    index.close()
    for _ in range(2):
        again = open_index(f"{postgres}#{name}", STAMP)
        monkeypatch.setattr(type(again), "small", 0)
        again.add(["new"], vectors[[4]], [{}])
        assert {hit.id for hit in again.search(vectors[[4]], 2)[0]} == {"i4", "new"} and again.count() == 51
        again.close()


def test_postgresql_is_checked_before_tables_are_made(postgres):
    import psycopg

    name = f"t{uuid.uuid4().hex[:16]}"
    with pytest.raises(UserError, match="takes at most 4000"):
        open_index(f"{postgres}#{name}", replace(STAMP, width=4001), create=True)
    with psycopg.connect(postgres, autocommit=True) as connection:
        assert connection.execute("SELECT to_regclass(%s)", (name,)).fetchone() == (None,)
        connection.execute(f"CREATE DATABASE {name}")
    empty = urlsplit(postgres)._replace(path=f"/{name}").geturl()
    with pytest.raises(UserError, match="no index here"):
        open_index(empty, STAMP)
    with psycopg.connect(empty) as connection:
        assert connection.execute("SELECT count(*) FROM pg_extension WHERE extname = 'vector'").fetchone() == (0,)
    open_index(empty, STAMP, create=True).close()


@pytest.fixture(params=["exact", "graph"])
def searched(request, monkeypatch, index, uri):
    """An index that is small, or taken for large."""
    if request.param == "exact" and uri.startswith("http"):
        pytest.skip("the items of a Chroma server are never searched in memory")
    if request.param == "graph":
        monkeypatch.setattr(type(index), "small", 0)
    return index


def unfound(index, ids, vectors):
    """Items whose own vector finds nothing as near as itself."""
    return [id for id, hits in zip(ids, index.search(vectors, 10)) if not hits or hits[0].score < 1 - 1e-4]


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_many_equal_vectors_hide_no_other(searched, uri, noise):
    """Copies beside others that are near them; as they are added, and after the copies are deleted."""
    many, few = (200, 100) if uri.startswith("qdrant:") else (700, 300)  # the server that stands in for Qdrant is slow
    rng = np.random.default_rng(0)
    copies = made_vectors(1) + noise * rng.normal(size=(many, 16))
    others = made_vectors(few, seed=1) + 2 * made_vectors(1)
    vectors = np.concatenate([copies, others]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"copy{i}" for i in range(many)] + [f"own{i}" for i in range(few)]
    for part in (slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)):
        searched.add(ids[part], vectors[part], [{"copy": id.startswith("copy")} for id in ids[part]])
    # A few copies, which are all alike, and all others.
    queries = [*range(0, many, 50), *range(many, len(ids))]
    assert searched.count() == len(ids)
    assert unfound(searched, [ids[i] for i in queries], vectors[queries]) == []
    exact = vectors[many:] @ vectors[many:].T
    found = searched.search(vectors[many:], 10, {"copy": False})
    near = [sum(hit.score >= np.sort(row)[-10] - 1e-4 for hit in hits) for row, hits in zip(exact, found)]
    assert np.mean(near) >= 9.9
    everything = searched.search(vectors[:1], many + 20)[0]
    assert {hit.id for hit in everything[:many]} == {*ids[:many]} and len({hit.id for hit in everything}) == many + 20
    assert searched.search(vectors[:1], 5, offset=many - 2)[0] == everything[many - 2 : many + 3]
    assert searched.delete(ids[:many]) == many
    assert searched.count() == few and unfound(searched, ids[many:], vectors[many:]) == []


def test_an_item_among_equal_ones_is_replaced_and_deleted_alone(searched):
    vectors = made_vectors(4)
    equal = np.repeat(vectors[:1], 5, 0)
    searched.add([*"abcde"], equal, [{"n": i} for i in range(5)])
    searched.add(["a", "b"], vectors[1:3], [{"m": 1}, {}])  # leave the others
    assert {hit.id for hit in searched.search(equal[:1], 3)[0]} == {*"cde"}
    searched.add(["c", "x"], np.stack([vectors[0], vectors[0]]), [{"n": 7}, {"n": 8}])
    assert {hit.id: hit.info for hit in searched.search(equal[:1], 4)[0]} == {
        "c": {"n": 7},
        "d": {"n": 3},
        "e": {"n": 4},
        "x": {"n": 8},
    }
    for left, gone in (("dex", "c"), ("ex", "d"), ("e", "x"), ("", "e")):
        assert searched.delete([gone]) == 1
        assert {hit.id for hit in searched.search(equal[:1], 10)[0] if hit.score > 0.999} == {*left}
    assert {item.id: item.info for item in searched.get([*"abcdex"])} == {"a": {"m": 1}, "b": {}}
    searched.add(["b"], vectors[1:2], [{}])  # becomes a copy of a
    assert {hit.id for hit in searched.search(vectors[1:2], 2)[0]} == {"a", "b"}
    assert searched.search(vectors[2:3], 1)[0][0].score < 0.999 and searched.count() == 2


def test_a_filter_finds_one_copy_of_many(searched):
    equal = np.repeat(made_vectors(1), 300, 0)
    searched.add([f"i{i}" for i in range(300)], equal, [{"n": i} for i in range(300)])
    searched.add([f"o{i}" for i in range(300)], made_vectors(300, seed=5), [{"n": i} for i in range(300)])
    for n in (0, 7, 299):
        assert [hit.id for hit in searched.search(equal[:1], 5, {"n": n})[0]] == [f"i{n}", f"o{n}"]
