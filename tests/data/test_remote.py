"""Data at a URL: what passes is waited for, what does not is one error, and the run can go on."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastvlp.data.records import remote
from fastvlp.data.records.shards import Shards
from fastvlp.data.sources.importing import import_data
from fastvlp.errors import UserError
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train
from tests.installed import skip_without
from tests.training.runs import assert_equal, made_pairs, made_run, weights

skip_without("aiohttp", install="aiohttp")


class Server:
    """Serves a folder on 127.0.0.1. `faults`: what happens to GET number n of a tar, by n, counted over all tars."""

    def __init__(self, folder: Path, *, ranges: bool = True):
        self.folder, self.ranges, self.count = folder, ranges, 0
        self.faults = lambda n: None
        self.statuses: Counter[int] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                server.answer(self, body=False)

            def do_GET(self):
                server.answer(self, body=True)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request, body: bool) -> None:
        path, status, fault = self.folder / request.path.strip("/"), 200, None
        if path.is_dir():
            data = "".join(f'<a href="{name.name}">x</a>' for name in sorted(path.iterdir())).encode()
        elif path.is_file():
            data = path.read_bytes()
        else:
            data, status = b"", 404
        if body and path.suffix == ".tar":
            self.count += 1
            fault = self.faults(self.count)
        total = len(data)
        found = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")) if self.ranges else None
        if found and status == 200:
            data, status = data[int(found[1]) : int(found[2]) + 1 if found[2] else total], 206
        status = fault if isinstance(fault, int) else status
        self.statuses[status] += 1
        request.send_response(status)
        if status == 206:
            request.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(data) - 1}/{total}")
        if self.ranges:
            request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(data) if status < 400 else 0))
        request.end_headers()
        if body and status < 400:
            request.wfile.write(data[: len(data) // 2] if fault == "cut" else data)


@pytest.fixture
def pairs(tmp_path):
    return made_pairs(tmp_path / "pairs")


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of a folder, whose faults are waited for only briefly."""
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02, 0.03))
    made = Server(folder)
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def server(pairs, monkeypatch):
    with serving(pairs, monkeypatch) as made:
        yield made


def run_on(server, pairs, out, **changes):
    run = made_run(pairs, out, "mlm", **changes)
    return replace(run, data=replace(run.data, train=f"{server.url}/train", val=None))


@pytest.mark.parametrize("fault", [503, 429, 500, "cut"])
def test_a_fault_that_passes_is_waited_for(server, pairs, fault):
    server.faults = lambda n: fault if n % 3 == 2 else None
    there, here = Shards(f"{server.url}/train"), Shards(pairs / "train")
    assert [there.read(i) for i in range(6)] == [here.read(i) for i in range(6)]


@pytest.mark.parametrize(("status", "advice"), [(403, "access"), (404, "address"), (410, "address")])
def test_a_refusal_is_not_tried_again(server, status, advice):
    shards = Shards(f"{server.url}/train")
    server.faults = lambda n: status
    before = server.count
    with pytest.raises(UserError, match=rf"00000\.tar: cannot read .*{advice}"):
        shards.read(0)
    assert server.count == before + 1


def test_a_server_without_ranges_is_read_too(server, pairs):
    server.ranges = False
    assert Shards(f"{server.url}/train/00000.tar").read(3) == Shards(pairs / "train").read(3)


@pytest.mark.slow
def test_a_host_that_goes_away_leaves_a_state_and_one_error(server, pairs, tmp_path):
    run = run_on(server, pairs, tmp_path / "a", batch_size=4)
    run = replace(run, data=replace(run.data, cache=False))
    straight = train(replace(run, out=str(tmp_path / "b")))
    needed = server.count
    server.count = 0
    server.faults = lambda n: 503 if n > needed * 3 // 4 else None
    with pytest.raises(UserError, match=r"00000\.tar: cannot read \(503.*4 times.*step \d is saved"):
        train(run)
    assert 1 <= load_checkpoint(tmp_path / "a/last.pt")["step"] < 6
    server.faults = lambda n: None
    assert_equal(weights(train(run, resume=True)), weights(straight))


def test_a_host_that_is_not_there_is_named(server, monkeypatch):
    server.http.shutdown()
    server.http.server_close()
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=rf"{server.url}/train: cannot read .*3 times.*network"):
        Shards(f"{server.url}/train")


@pytest.mark.parametrize("url", ["nosuch://host/x", "sftp://host/x"])
def test_a_missing_driver_is_named(url):
    with pytest.raises(UserError, match=f"{url}: cannot be opened"):
        Shards(url)


def test_an_import_reads_urls(server, pairs, tmp_path):
    server.faults = lambda n: 503 if n == 1 else None
    import_data(f"{server.url}/train/00000.tar", tmp_path / "one", progress=False)
    assert Shards(tmp_path / "one" / "train").keys == Shards(pairs / "train").keys
    import_data(Path(f"{server.url}/train"), tmp_path / "all", progress=False)
    assert Shards(tmp_path / "all" / "train").keys == Shards(pairs / "train").keys
    assert not list(tmp_path.glob("*.download"))


def test_what_a_failed_import_downloaded_is_not_kept(server, pairs, tmp_path):
    with pytest.raises(RuntimeError), remote.at_hand(f"{server.url}/train/00000.tar", tmp_path / "out") as path:
        assert path.is_file()
        raise RuntimeError
    assert not path.exists() and not list(tmp_path.glob("*.download"))
    with remote.at_hand(f"{server.url}/val/00000.tar", tmp_path / "out") as other:
        assert other != path and other.read_bytes() == (pairs / "val/00000.tar").read_bytes()
