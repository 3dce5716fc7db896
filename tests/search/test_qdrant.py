"""Parts of Qdrant's engine that others lack: addresses, the key, requests to the server, and filters by terms. The tests of
every engine are in test_index.py."""

import uuid

import numpy as np
import pytest

from fastvlp.errors import UserError
from fastvlp.search.checks import EngineError
from fastvlp.search.engines.interface import engine_of, open_index, pictures_of
from fastvlp.search.engines.qdrant import KEY, QdrantIndex, _term
from tests.installed import skip_without
from tests.search.made_items import STAMP, made_vectors

skip_without("qdrant_client", install="-e '.[qdrant]'")
API_KEY = "a key that nobody prints"


@pytest.fixture
def uri(qdrant_server):
    qdrant_server.requests.clear()
    yield f"{qdrant_server.address}/t{uuid.uuid4().hex[:16]}"
    qdrant_server.api_key = None


def test_addresses_name_a_server_a_collection_and_a_path_before_it(monkeypatch):
    asked = {}
    monkeypatch.setattr("qdrant_client.QdrantClient", lambda **given: asked.update(given) or 1 / 0)
    for address, wanted in {
        "qdrant://host/photos": ("host", 6333, False, None),
        "qdrant+https://host:443/photos": ("host", 443, True, None),
        "qdrant+https://host/behind/proxy/photos": ("host", 6333, True, "behind/proxy"),
    }.items():
        assert engine_of(address) is QdrantIndex and pictures_of(address) is None
        with pytest.raises(ZeroDivisionError):
            open_index(address)
        assert (asked["host"], asked["port"], asked["https"], asked["prefix"]) == wanted


@pytest.mark.parametrize("address", ["qdrant://host", "qdrant:///photos", "qdrant://host/photos?tenant=a"])
def test_addresses_that_name_no_collection_are_refused(address):
    with pytest.raises(UserError):
        open_index(address)


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_the_key_comes_from_the_environment_and_is_in_no_message(uri, qdrant_server, monkeypatch):
    qdrant_server.api_key = API_KEY
    for key in (None, "another"):
        monkeypatch.delenv(KEY, raising=False) if key is None else monkeypatch.setenv(KEY, key)
        with pytest.raises(EngineError, match=f"401.*{KEY}") as refused:
            open_index(uri, STAMP, create=True)
        assert "another" not in str(refused.value)
    with pytest.raises(UserError, match=f"environment, as {KEY}") as refused:
        open_index(uri.replace("//", f"//user:{API_KEY}@"))
    assert API_KEY not in str(refused.value)
    monkeypatch.setenv(KEY, API_KEY)
    open_index(uri, STAMP, create=True).close()
    assert {headers["api-key"] for *_, headers in qdrant_server.requests[-3:]} == {API_KEY}


def test_a_missing_server_and_a_foreign_collection_are_reported(uri, qdrant_server):
    from qdrant_client import models

    with pytest.raises(EngineError, match="is a Qdrant server running there"):
        open_index("qdrant://127.0.0.1:9/x", STAMP)
    name = uri.rpartition("/")[2]
    qdrant_server.store.create_collection(name, models.VectorParams(size=16, distance=models.Distance.DOT))
    with pytest.raises(UserError, match="made by another program"):
        open_index(uri, STAMP, create=True)


def test_a_collection_has_a_graph_of_nodes_alone_and_indexes_of_what_is_filtered(uri, qdrant_server):
    index = open_index(uri, STAMP, create=True)
    vectors = index._found().config.params.vectors
    assert vectors["node"].hnsw_config.m == 24 and vectors["copy"].hnsw_config.m == 0
    assert [path.rpartition("/")[2] for method, path, _ in qdrant_server.requests if method == "PUT"][1:] == [
        "index"
    ] * 2
    index.close()


def test_requests_keep_below_what_a_server_takes(uri, qdrant_server, monkeypatch):
    monkeypatch.setattr("fastvlp.search.engines.qdrant.NUMBERS", 16 * 10)
    index = open_index(uri, STAMP, create=True)
    index.add([f"i{i}" for i in range(25)], made_vectors(25), [{}] * 25)
    assert sum(request[:2] == ("PUT", qdrant_path(uri, "points")) for request in qdrant_server.requests) == 3
    assert index.count() == 25
    index.close()


def qdrant_path(uri, *parts):
    return "/".join(["/collections", uri.rpartition("/")[2], *parts])


def test_a_filter_finds_equal_values_of_any_field(uri):
    """Numbers are equal whatever their type, and true is no number; a name may hold anything."""
    index = open_index(uri, STAMP, create=True)
    values = [1, 1.0, True, "1", 1.5, 2**60 + 1, 2**60]
    index.add([str(i) for i in range(len(values))], made_vectors(len(values)), [{'a."b[]': value} for value in values])
    for value, wanted in ((1, "01"), (1.0, "01"), (True, "2"), ("1", "3"), (1.5, "4"), (2**60 + 1, "5"), (2**60, "6")):
        hits = index.search(made_vectors(1, seed=1), 10, {'a."b[]': value})[0]
        assert {hit.id for hit in hits} == {*wanted}
    assert _term("a", 1) == _term("a", 1.0) != _term("a", True) and _term("a", 1) != _term("a", "1") != _term("b", "1")
    index.close()


def test_copies_have_no_node_and_the_last_of_them_becomes_one(uri, qdrant_server):
    index = open_index(uri, STAMP, create=True)
    index.add([*"abc"], np.repeat(made_vectors(1), 3, 0), [{}] * 3)

    def kinds():
        points, _ = qdrant_server.store.scroll(uri.rpartition("/")[2], with_vectors=True)
        return {point.payload["id"]: next(iter(point.vector)) for point in points}

    assert kinds() == {"a": "node", "b": "copy", "c": "copy"}
    index.delete(["a", "b"])
    assert kinds() == {"c": "node"}
    index.close()
