"""Read shards from a web server with a delay, in random order and as they are stored: requests for each record, and time.

    python bench/remote_reading.py --delay-ms 20

Serves made pairs on 127.0.0.1; each request for a part of a shard waits `delay_ms`, as a store far away does. Prints for each
order the requests of a record, and records a second of an epoch of the loader alone, images decoded.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import tyro
from beside_commit import made_records
from records import RESULTS, append, stamp

from fastvlp.batch import Record
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.tokenize import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    records: int = 2000
    """Records of the data, 500 in a shard."""
    side: int = 320
    """Width of the pictures in pixels."""
    delay_ms: float = 20
    """Wait before each answer."""
    batch: int = 64
    """Rows of a batch."""
    out: Path = RESULTS / "remote_reading.jsonl"
    """File that rows are appended to."""


def served(folder: Path, delay_s: float, requests: list[str]) -> ThreadingHTTPServer:
    """A server of the files of a folder, which notes the requests for parts of shards."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Prints nothing, where the base class prints each request."""

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            path = folder / self.path.strip("/")
            if path.is_dir():
                data = "".join(f'<a href="{inside.name}">x</a>' for inside in sorted(path.iterdir())).encode()
            else:
                data = path.read_bytes() if path.is_file() else b""
            status, part = 200 if data else 404, re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            self.send_response(206 if part else status)
            if part:
                requests.append(self.path)
                time.sleep(delay_s)
                first, last = int(part[1]), min(int(part[2]), len(data) - 1)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[first : last + 1]
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(o: Options) -> None:
    requests: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder) / "train", per_shard=500) as writer:
            for key, image, captions in made_records(o.records, o.side):
                writer.write(Record(key=key, images=(image,), info={"captions": captions}))
        server = served(Path(folder), o.delay_ms / 1e3, requests)
        url = f"http://127.0.0.1:{server.server_port}/train"
        words = Tokenizer.train((f"word{i} word{i}" for i in range(400)), vocab_size=500)
        orders: tuple[Literal["random", "sequential"], ...] = ("random", "sequential")
        for order in orders:
            data = PairData(train=url, batch_size=o.batch, cache=False, order=order, shuffle_buffer=500)
            rows = data.rows("train", words, 112, strict=False)
            assert rows is not None
            loader = Loader(rows.count, rows.make, batch_size=o.batch, seed=0, reading=rows.reading)
            requests.clear()
            began, batches, number = time.perf_counter(), loader.batches(), o.records // o.batch
            taken = sum(len(next(batches)[0]) for _ in range(number))
            seconds = time.perf_counter() - began
            batches.close()  # type: ignore[attr-defined]
            row = {"order": order, "records": taken, "delay_ms": o.delay_ms, "batch": o.batch, "seconds": seconds}
            row |= {"requests_a_record": len(requests) / taken, "records_a_second": taken / seconds}
            append(o.out, [stamp("cpu", "remote_reading.py") | row])
            print(f"{order}: {row['requests_a_record']:.4f} requests a record, {row['records_a_second']:.0f} records/s")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
