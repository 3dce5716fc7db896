"""An index engine in a user's own file works without a change to the package."""

from __future__ import annotations

from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.search.engines.interface import IndexEngine, engine_of, engines, open_index
from tests.processes import printed_by
from tests.search.made_items import OWN_ENGINE

ENGINE = str(OWN_ENGINE)


def test_the_commands_build_and_search_an_index_of_the_users_engine(exports, world, tmp_path, capsys):
    uri, export = f"numpy:{tmp_path}/photos.npz", str(exports["towers"])
    build = ["--import", ENGINE, "index", "build", uri, "--export", export, "--data", str(world / "test")]
    # The engine has no place for pictures.
    assert main(build) == 2 and "--pictures" in capsys.readouterr().err
    assert main([*build, "--images", "none"]) == 0
    assert f"{uri}: 12 images" in capsys.readouterr().out
    search = ["--import", ENGINE, "index", "search", uri, "--export", export, "--text", "a red circle", "--k", "3"]
    assert main(search) == 0
    assert capsys.readouterr().out.count("scene-test-") >= 3
    other = [*search[:5], "--export", str(exports["all"]), "--text", "a"]
    assert main(other) == 2 and "another model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_help_lists_it():
    # In a new process: a command line that was made before knows the engines of that time.
    status, printed = printed_by(["--import", ENGINE, "index", "build", "--help"])
    assert status == 0 and "numpy:FILE" in " ".join(printed.replace("│", " ").split())


def test_the_service_searches_it(exports, world, tmp_path, monkeypatch, capsys):
    uri, export = f"numpy:{tmp_path}/photos.npz", str(exports["towers"])

    def ask(server: Any, sockets: Any) -> None:
        with TestClient(server.config.app, "http://localhost") as client:
            for id, record in enumerate(pictures):
                assert client.post("/v1/items", data={"id": f"p{id}"}, files={"image": record}).status_code == 201
            hits = client.post("/v1/search", files={"image": pictures[1]}).json()["results"]
            assert hits[0]["id"] == "p1" and len(hits) == 3
            assert client.get(hits[0]["image"]).status_code == 200
            assert client.delete("/v1/items/p1").status_code == 200
            assert client.get("/health").json()["items"] == 2

    pictures = [Shards(world / "test").read(i).images[0] for i in range(3)]
    monkeypatch.setattr(uvicorn.Server, "run", ask)
    serve = ["--import", ENGINE, "serve", export, "--index", uri, "--create", "--port", "0"]
    assert main([*serve, "--pictures", str(tmp_path / "pictures")]) == 0
    index = open_index(uri)
    assert index.count() == 2 and index.get(["p0"])[0].id == "p0"


def test_an_address_that_no_engine_has_is_refused_and_no_folder_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--import"):
        open_index("unknown:place")
    (tmp_path / "odd:name").mkdir()
    with pytest.raises(UserError, match="no index here"):
        open_index("odd:name")
    assert [path.name for path in tmp_path.iterdir()] == ["odd:name"]


def test_the_longest_prefix_decides_and_two_of_one_length_are_refused(monkeypatch):
    one, two = (type(name, (IndexEngine,), {"prefixes": ("a:",), "address": "a:X"}) for name in ("One", "Two"))
    longer = type("Longer", (IndexEngine,), {"prefixes": ("a:b:",), "address": "a:b:X"})
    all_engines = engines()
    listed = [*all_engines, one, longer]
    monkeypatch.setattr("fastvlp.search.engines.interface.engines", lambda: listed)
    assert engine_of("a:b:c") is longer and engine_of("a:c") is one and engine_of("photos") in all_engines
    listed.append(two)
    with pytest.raises(UserError, match="another prefix"):
        engine_of("a:c")
