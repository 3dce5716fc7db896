"""Chroma's server, its tenants and databases, its Cloud, and what is secret in an address. The tests of every engine are in
test_index.py."""

import functools
import uuid
from urllib.parse import urlsplit

import pytest

from fastvlp.errors import UserError
from fastvlp.search.addresses import shown
from fastvlp.search.checks import EngineError
from fastvlp.search.chroma_server import CLOUD, Limits, collection_name, connect
from fastvlp.search.engines.interface import open_index
from tests.installed import skip_without
from tests.search.made_items import STAMP, made_vectors

skip_without("chromadb", install="-e '.[serve]'")


@pytest.fixture
def environment(monkeypatch):
    for name in ("CHROMA_API_KEY", "CHROMA_TENANT", "CHROMA_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def tenant(chroma_server):
    """A tenant with the databases one and two."""
    import chromadb

    place, name = urlsplit(chroma_server), f"t{uuid.uuid4().hex[:8]}"
    settings = chromadb.config.Settings(
        chroma_api_impl="chromadb.api.fastapi.FastAPI",
        chroma_server_host=place.hostname,
        chroma_server_http_port=place.port,
        anonymized_telemetry=False,
    )
    admin = chromadb.AdminClient(settings)
    admin.create_tenant(name)
    for database in ("one", "two"):
        admin.create_database(database, name)
    return name


def made(uri, id):
    index = open_index(uri, STAMP, create=True)
    index.add([id], made_vectors(1), [{}])
    index.close()


def held(uri):
    index = open_index(uri, STAMP)
    ids = [hit.id for hit in index.search(made_vectors(1), 9)[0]]
    index.close()
    return ids


def test_tenants_and_databases_of_a_server_are_apart(chroma_server, tenant, environment):
    plain, one, two = (
        f"{chroma_server}/photos-{tenant}{end}" for end in ("", "?tenant={0}&database=one", "?database=two")
    )
    one = one.format(tenant)
    made(plain, "default")
    made(one, "one")
    environment.setenv("CHROMA_TENANT", tenant)
    made(two, "two")
    environment.setenv("CHROMA_DATABASE", "one")
    assert held(one) == ["one"] and held(two) == ["two"]
    # The environment says what an address leaves out.
    assert held(plain) == ["one"]
    environment.delenv("CHROMA_TENANT")
    environment.delenv("CHROMA_DATABASE")
    assert held(plain) == ["default"]


def test_a_missing_tenant_or_database_and_a_wrong_option_are_named(chroma_server, tenant, environment):
    for options in ("?tenant=nobody", f"?tenant={tenant}&database=three"):
        with pytest.raises(EngineError, match=r"not found.*make it first"):
            open_index(f"{chroma_server}/photos{options}", STAMP, create=True)
    with pytest.raises(UserError, match="it takes tenant, database"):
        open_index(f"{chroma_server}/photos?tenent=a", STAMP)


def test_a_server_is_given_the_key_of_the_environment(environment):
    given = {}
    environment.setattr("chromadb.HttpClient", lambda *place, **options: given.update(options, place=place))
    connect("https://host/photos", None)
    assert given["place"] == ("host", 443) and given["ssl"] and given["headers"] == {}
    assert (given["tenant"], given["database"]) == ("default_tenant", "default_database")
    environment.setenv("CHROMA_API_KEY", "secret")
    connect("http://:word@host/photos?tenant=a&database=b", None)
    assert given["headers"] == {"x-chroma-token": "secret", "Authorization": "Bearer word"}
    assert given["place"] == ("host", 8000) and (given["tenant"], given["database"]) == ("a", "b")


def test_the_cloud_is_given_the_key_the_tenant_and_the_database(environment):
    given = {}
    environment.setattr("chromadb.CloudClient", lambda **options: given.update(options))
    cloud = f"https://{CLOUD}/photos"
    with pytest.raises(UserError, match="set CHROMA_API_KEY"):
        connect(cloud, None)
    environment.setenv("CHROMA_API_KEY", "secret")
    environment.setenv("CHROMA_DATABASE", "b")
    connect(f"{cloud}?tenant=a", "settings")
    assert given == {"tenant": "a", "database": "b", "api_key": "secret", "settings": "settings"}
    assert collection_name(cloud) == "photos"


def test_an_index_in_the_cloud_keeps_to_its_limits(chroma_server, environment):
    """The Cloud's own client, connected to the local server: which takes any key, and has no limits of its own."""
    import chromadb

    place, name = urlsplit(chroma_server), f"t{uuid.uuid4().hex[:8]}"
    here = functools.partial(chromadb.CloudClient, cloud_host=place.hostname, cloud_port=place.port, enable_ssl=False)
    environment.setattr("chromadb.CloudClient", here)
    environment.setattr("fastvlp.search.chroma_server.CLOUD_LIMITS", Limits(records=5, results=8))
    environment.setenv("CHROMA_API_KEY", "secret")
    index = open_index(f"https://{CLOUD}/{name}", STAMP, create=True)
    asked = []
    for action in ("upsert", "get", "query"):
        seen(environment, index._collection, action, asked)
    vectors = made_vectors(13)
    vectors[5:11] = vectors[5]
    index.add([f"i{i}" for i in range(13)], vectors, [{"n": i} for i in range(13)])
    assert index.count() == 13 and index.delete(["i5", "i12"]) == 2
    assert {hit.id for hit in index.search(vectors[5:6], 5)[0]} == {f"i{i}" for i in range(6, 11)}
    assert [hit.id for hit in index.search(vectors[:1], 8, {"n": 11})[0]] == ["i11"]
    with pytest.raises(UserError, match="8 best at most"):
        index.search(vectors[:1], 9)
    index.close()
    assert max(number for action, number in asked if action != "query") <= 5
    assert max(number for action, number in asked if action == "query") == 8


def seen(monkeypatch, collection, action, asked):
    """Notes how many records each request writes, gets, or searches for."""
    act = getattr(collection, action)

    def noting(**given):
        asked.append((action, given.get("n_results") or len(given.get("ids", []))))
        return act(**given)

    monkeypatch.setattr(collection, action, noting)


def test_what_is_secret_in_an_address_is_not_shown():
    assert shown("http://user:word@host/photos") == "http://user@host/photos"
    assert (
        shown("postgresql://user:a%20b@host/photos?password=word&x=1#t")
        == "postgresql://user@host/photos?password=...&x=1#t"
    )
    assert shown("photos/index") == "photos/index" and shown("http://host:8000/a") == "http://host:8000/a"
    with pytest.raises(EngineError) as refused:
        open_index("http://:hidden@127.0.0.1:9/photos", STAMP)
    assert "hidden" not in str(refused.value) and "127.0.0.1:9/photos" in str(refused.value)
