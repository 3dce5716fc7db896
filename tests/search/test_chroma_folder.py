"""An index in a folder, which Chroma keeps. The tests of every engine are in test_index.py."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from fastvlp.errors import UserError
from fastvlp.search.checks import EngineError
from fastvlp.search.engines.interface import open_index, pictures_of
from tests.installed import skip_without
from tests.search.made_items import STAMP, fill, made_vectors, vector_of

skip_without("chromadb", install="-e '.[serve]'")


def test_a_relative_folder_is_one_of_the_current_folder(tmp_path, monkeypatch):
    opened = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        opened.append(open_index("index", replace(STAMP, model=name), create=True))
        opened[-1].add([name], made_vectors(1), [{}])
    assert [index.stamp.model for index in opened] == ["first", "second"]
    assert [hit.id for index in opened for hit in index.search(made_vectors(1), 9)[0]] == ["first", "second"]
    for index in opened:
        index.close()


def test_pictures_of_a_relative_folder_stay_beside_their_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index, pictures = open_index("index", STAMP, create=True), pictures_of("index")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pictures.put("a", b"picture")
    index.close()
    assert pictures_of(str(tmp_path / "index")).get("a") == b"picture"


@pytest.mark.slow
def test_a_folder_has_one_writer_whose_items_readers_see(tmp_path):
    uri = str(tmp_path / "index")
    reader = open_index(uri, STAMP, create=True)
    command = [sys.executable, "-m", "tests.search.made_items", uri, "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert next(line for line in child.stdout if line.strip() == "1")
        assert reader.search(vector_of(39)[None], 1)[0][0].id == "i39"
        with pytest.raises(UserError, match=f"another process .id {child.pid}. writes"):
            reader.add(["mine"], made_vectors(1), [{}])
        child.kill()
    reader.add(["mine"], made_vectors(1), [{}])
    assert reader.count() % 20 == 1
    reader.close()


def test_a_folder_can_be_moved(tmp_path):
    index = open_index(str(tmp_path / "index"), STAMP, create=True)
    vectors = fill(index)
    index.close()
    moved = open_index(str(shutil.move(tmp_path / "index", tmp_path / "elsewhere")), STAMP)
    assert moved.search(vectors[[3]], 1)[0][0].id == "i3"
    moved.close()


def test_damaged_folders_and_missing_servers_are_reported(tmp_path):
    (tmp_path / "chroma.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="damaged"):
        open_index(str(tmp_path), STAMP)
    with pytest.raises(EngineError, match="is a Chroma server running there"):
        open_index("http://127.0.0.1:9/x", STAMP)
    with pytest.raises(UserError, match="an index is a folder"):
        open_index("ftp://somewhere/x", STAMP)


def test_the_folder_of_pictures_is_the_indexs_or_a_given_one(tmp_path):
    assert pictures_of("http://127.0.0.1/x") is None
    assert pictures_of("http://127.0.0.1/x", tmp_path).folder == tmp_path
    assert pictures_of(str(tmp_path)).folder == tmp_path / "pictures"


@pytest.mark.slow
def test_opening_an_index_loads_no_model_and_connects_to_nothing(tmp_path):
    code = f"""
import socket, sys
def refuse(*_): raise SystemExit("a connection was opened")
socket.socket.connect = refuse
from tests.search.made_items import STAMP, made_vectors
from fastvlp.search.engines.interface import open_index
index = open_index({str(tmp_path / "index")!r}, STAMP, create=True)
index.add(["a"], made_vectors(1), [{{}}])
assert index.search(made_vectors(1), 1)[0][0].id == "a"
index.close()
sys.exit("onnxruntime" in sys.modules or "torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_cannot_be_written_is_the_cause_that_is_named(tmp_path, monkeypatch):
    open_index(str(tmp_path / "index"), STAMP, create=True).close()

    def client(*_, **__):
        raise RuntimeError("error returned from database: (code: 8) attempt to write a readonly database")

    monkeypatch.setattr("chromadb.PersistentClient", client)
    with pytest.raises(EngineError, match="permission, or search in a copy"):
        open_index(str(tmp_path / "index"), STAMP)
