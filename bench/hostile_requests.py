"""Send a service malformed and hostile requests, and see whether it survives them: a section of `faults.py`.

    python bench/hostile_requests.py --malformed 10000

Starts `vlp serve` with a model of random weights and an index of a few pictures in a process of its own. 50 targeted requests,
each of which once froze or filled a service or is like one that did, come one after the other; then malformed ones from several
clients. All the time /health is asked. A request is survived where its answer is no 5xx but a deliberate 503, the service
prints no traceback and /health answers within a second. Of many requests the last quarter may not take more memory than the
second.
"""

from __future__ import annotations

import io
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import tyro
from PIL import Image
from random_service import export_random_model, random_texts
from records import RESULTS, append, stamp

OUT = RESULTS / "hostile_requests.jsonl"
# Of fewer requests the memory says nothing about those that follow.
ENOUGH = 1000
PATHS = ("/v1/embeddings", "/v1/score", "/v1/search", "/v1/items", "/v1/caption", "/v1/answer")


@dataclass(frozen=True, kw_only=True)
class Options:
    malformed: int = 10_000
    """Malformed requests after the targeted ones."""
    clients: int = 16
    """Clients at once that send them."""
    seed: int = 0
    """Seed of the malformed requests."""
    note: str = ""
    """Other work on the machine at the same time; saved with the result."""


@dataclass
class Watched:
    """Observations of a service: the slowest answer of /health in seconds, its memory in MB, and what it printed.

    `late_s`: by how much the asking of /health was late at most, since this process had to wait for a core."""

    address: tuple[str, int]
    process: subprocess.Popen[str]
    slowest_s: float = 0.0
    late_s: float = 0.0
    failed: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def memory_mb(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1000


def head(method: str, path: str, length: int, media: str = "application/json", more: bytes = b"") -> bytes:
    lines = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {media}\r\n"
    return lines.encode("latin-1", "replace") + more + f"content-length: {length}\r\n\r\n".encode()


def post(path: str, body: bytes, media: str = "application/json", more: bytes = b"") -> bytes:
    return head("POST", path, len(body), media, more) + body


def multipart(path: str, parts: Sequence[tuple[bytes, bytes]]) -> bytes:
    """`parts`: headers and contents of each part."""
    body = b"".join(b"--x\r\n" + headers + b"\r\n\r\n" + content + b"\r\n" for headers, content in parts) + b"--x--\r\n"
    return post(path, body, "multipart/form-data; boundary=x")


def file_part(data: bytes, name: bytes = b"image") -> tuple[bytes, bytes]:
    return b'content-disposition: form-data; name="' + name + b'"; filename="a"', data


def field_part(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    return b'content-disposition: form-data; name="' + name + b'"', value


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def many_scans(side: int, scans: int) -> bytes:
    data = saved(Image.new("RGB", (side, side), (90, 90, 90)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiled_tiff() -> bytes:
    packed = zlib.compress(bytes(1000))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40_000), (323, 40_000), (324, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (325, len(packed))])
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", 10) + entries + bytes(4)


def run_length_bmp(side: int) -> bytes:
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    body, at = b"\0\2\xff\xff" * 3000, 54 + len(palette)
    sizes = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", at + len(body), 0, 0, at) + sizes + palette + body


def frames(format: str) -> bytes:
    first, *rest = (Image.new("RGB", (1500, 1500), (i, 0, 0)) for i in range(40))
    return saved(first, format, save_all=True, append_images=rest)


def pictures() -> Iterator[tuple[str, bytes]]:
    """Pictures that cost more than their size or their pixels say."""
    yield "JPEG of 400 scans", many_scans(6000, 400)
    yield "JPEG of 45 scans", many_scans(3000, 45)
    yield "PNG of 50,000 x 50,000", png(50_000, 50_000, bytes(9999))
    yield "PNG of 6,300 x 6,300", saved(Image.new("RGBA", (6300, 6300)), "PNG")
    yield "PNG of 20,000,000 x 2", png(20_000_000, 2, bytes(9999))
    yield "PNG cut short", saved(Image.new("RGB", (500, 500)), "PNG")[:300]
    yield "GIF of 40 frames", frames("GIF")
    yield "WebP of 40 frames", frames("WEBP")
    yield "TIFF of a huge tile", tiled_tiff()
    yield "BMP of run lengths", run_length_bmp(6000)
    yield "PPM of digits", b"P3 1500 1500 255\n" + b"1 " * (1500 * 1500 * 3)
    yield "PPM of spaces", b"P3 1500 1500 255\n" + b" " * 5_000_000
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + b"loop " * 100


def targeted() -> Iterator[tuple[str, bytes]]:
    """Requests as bytes, by name."""
    for megabytes in (1, 3, 20):
        yield f"{megabytes} MB of numbers", post(PATHS[0], b'{"input": [' + b"1," * (megabytes * 500_000) + b"1]}")
    yield "empty mappings", post(PATHS[0], b'{"input": [' + b"{}," * 300_000 + b"1]}")
    yield "pairs", post(PATHS[1], b'{"pairs": [' + b'{"text":1},' * 200_000 + b"1]}")
    yield "a deep list", post(PATHS[0], b'{"input": ' + b"[" * 2_000_000)
    yield "a deep mapping", post(PATHS[2], b'{"where":' * 200_000)
    yield "a thousand conditions", post(PATHS[2], condition({f"f{i}": 1 for i in range(1000)}))
    yield "a thousand values", post(PATHS[2], condition({"a": [*range(1000)]}))
    yield "32 conditions of 64 values", post(PATHS[2], condition({f"f{i}": [*range(63), "x"] for i in range(32)}))
    yield "a huge number", post(PATHS[0], b'{"input": "a", "dimensions": ' + b"9" * 3_000_000 + b"}")
    yield "a huge exponent", post(PATHS[3], b'{"image": "aaaa", "info": {"a": 1e999999999}}')
    yield "NaN", post(PATHS[3], b'{"image": "aaaa", "info": {"a": NaN}}')
    yield "a 20 MB text", post(PATHS[0], b'{"input": "' + b"a" * 20_000_000 + b'"}')
    yield "20 MB of escapes", post(PATHS[0], b'{"input": "' + b"\\u00e9" * 3_300_000 + b'"}')
    yield "20 MB of base64", post(PATHS[4], b'{"image": "' + b"A" * 20_000_000 + b'"}')
    yield "lone surrogates", post(PATHS[0], b'{"input": "\\ud800"}')
    yield "joined marks", post(PATHS[0], json.dumps({"input": "a" + "\u0301" * 1999}).encode())
    yield "one letter that becomes 18", post(PATHS[0], json.dumps({"input": "\ufdfa" * 2000}).encode())
    yield "NUL in a text", post(PATHS[0], b'{"input": "a\\u0000b"}')
    yield "UTF-16", post(PATHS[0], '{"input": "a"}'.encode("utf-16"))
    yield "another charset", post(PATHS[0], b'{"input": "a"}', "application/json; charset=nonsense")
    yield "no type", post(PATHS[0], b"\xff" * 1000, "")
    yield "20,000 fields", multipart(PATHS[0], [field_part(b"input", b"a")] * 20_000)
    yield "20,000 files", multipart(PATHS[0], [file_part(b"a")] * 20_000)
    yield "a part of many headers", multipart(PATHS[0], [(b"x: y\r\n" * 100_000, b"a")])
    yield "a part of a long header", multipart(PATHS[0], [(b"x: " + b"y" * 5_000_000, b"a")])
    yield "nearly boundaries", multipart(PATHS[3], [file_part(b"\r\n--" * 2_000_000)])
    yield "line ends", post(PATHS[3], b"\r" * 10_000_000, "multipart/form-data; boundary=x")
    yield "a long boundary", post(PATHS[3], b"a", "multipart/form-data; boundary=" + "x" * 20_000)
    yield "nested JSON in a form", multipart(PATHS[3], [file_part(b"a"), field_part(b"info", b"[" * 900_000)])
    yield "a long address", b"GET /" + b"a" * 5_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
    yield "many headers", b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 500_000 + b"\r\n"
    yield "two lengths", head("POST", PATHS[0], 5, more=b"content-length: 7\r\n") + b"aaaaaaa"
    yield "a negative length", head("POST", PATHS[0], -5)
    yield "a huge length", head("POST", PATHS[0], 10**18) + b"{"
    chunks = head("POST", PATHS[0], 0).replace(b"content-length: 0", b"transfer-encoding: chunked")
    yield "chunks of a byte", chunks + b"1\r\na\r\n" * 1_000_000 + b"0\r\n\r\n"
    yield "a huge chunk", chunks + b"ffffffffffffffff\r\n" + b"a" * 100
    yield "another host", b"GET /v1/items HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n"
    for name, data in pictures():
        yield name, multipart(PATHS[3], [file_part(data)])


def condition(where: dict[str, Any]) -> bytes:
    return json.dumps({"text": "a", "where": where}).encode()


VALID: tuple[Callable[[], bytes], ...] = (
    lambda: post("/v1/embeddings", json.dumps({"input": ["a red dog", "two men"]}).encode()),
    lambda: post("/v1/search", json.dumps({"text": "a dog", "limit": 5, "where": {"n": [1, 2]}}).encode()),
    lambda: multipart("/v1/items", [file_part(PICTURE), field_part(b"id", b"a/b"), field_part(b"info", b'{"n": 1}')]),
    lambda: multipart("/v1/search", [file_part(PICTURE), field_part(b"text", b"a dog")]),
    lambda: b"GET /v1/items?limit=5&seed=3 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    lambda: b"GET /v1/pictures/i1 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    lambda: head("DELETE", f"/v1/items/{quote('a/b', safe='')}", 0),
)
PICTURE = saved(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
PIECES = (b"\0", b"\xff", b"\r\n", b"\r\n\r\n", b'"', b"{", b"[", b"]}", b"NaN", b"-1", b"1e999", b"\\ud800", b"%00")
PIECES += (b"../", b"null", b"true", b"--x", b"--x--", b"9" * 400, b"a" * 3000, "\u202e红\U0001f993".encode(), b":")


def malformed(draw: random.Random) -> bytes:
    """A valid request of which bytes were changed, taken out, doubled or put in; sometimes with the right length."""
    data = bytearray(draw.choice(VALID)())
    body = data.find(b"\r\n\r\n") + 4
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        # Most often in the body, or the head would be all that is tried.
        first = body if draw.random() < 0.6 and body < len(data) else 0
        at = draw.randrange(first, len(data) + 1)
        match draw.randrange(4):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[at : at + draw.randrange(1, 40)]
            case 2:
                data[at:at] = data[at : at + draw.randrange(1, 400)]
            case _:
                data[at:at] = draw.choice(PIECES)
    end = data.find(b"\r\n\r\n")
    if end >= 0 and draw.random() < 0.7:
        begin = data.find(b"content-length: ")
        if 0 <= begin < end:
            data[begin : data.find(b"\r\n", begin)] = b"content-length: %d" % (len(data) - end - 4)
    return bytes(data)


def answer_to(address: tuple[str, int], request: bytes, seconds: float = 60) -> str:
    """The status of the answer; `closed` where the connection was ended without one, `silent` where nothing came in time."""
    try:
        with socket.create_connection(address, timeout=seconds) as connection:
            with suppress(OSError):  # refused before it was sent; an answer may be there
                connection.sendall(request)
            line = connection.recv(64)
    except TimeoutError:
        return "silent"
    except OSError:
        return "closed"
    return line[9:12].decode("latin-1") if line.startswith(b"HTTP/1.") else "closed"


@contextmanager
def watched_service(folder: Path) -> Iterator[Watched]:
    """Runs a service with random weights, asks for /health all the time, and keeps what it prints."""
    model = export_random_model(folder, random_texts(2000, seed=0), 64)
    options = [str(model), "--index", str(folder / "index"), "--create", "--port", "0", "--threads", "1"]
    # Of a request that is cut short it waits for the rest.
    options += ["--seconds", "3", "--idle-s", "2"]
    command = [sys.executable, "-m", "fastvlp", "serve", *options, "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("http"))
        port = int(line.partition("/  ")[0].rpartition(":")[2])
        watched, done = Watched(("127.0.0.1", port), process), threading.Event()
        reader = threading.Thread(target=lambda: watched.printed.extend(process.stdout or ()))
        health = threading.Thread(target=ask_for_health, args=(watched, done))
        reader.start()
        health.start()
        try:
            yield watched
        finally:
            done.set()
            health.join()
            process.terminate()
            process.wait(30)
            reader.join()


def ask_for_health(watched: Watched, done: threading.Event) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    ended = time.perf_counter()
    while not done.wait(0.05):
        began = time.perf_counter()
        status = answer_to(watched.address, request)
        watched.late_s, ended = max(watched.late_s, began - ended - 0.05), time.perf_counter()
        watched.slowest_s = max(watched.slowest_s, ended - began)
        if status != "200":
            watched.failed.append(status)


def good(status: str) -> bool:
    """Whether an answer is one that a service may give."""
    return status in ("closed", "503") or (status.isdigit() and status < "500")


def survived(watched: Watched, requests: Sequence[tuple[str, bytes]], clients: int) -> dict[str, Any]:
    """Sends requests, and returns a row of the table: what was tried, survived and lost."""
    memory, watched.slowest_s, watched.late_s = [watched.memory_mb()], 0.0, 0.0
    printed, failed = len(watched.printed), len(watched.failed)
    statuses: Counter[str] = Counter()
    lost: list[str] = []
    with ThreadPoolExecutor(clients) as senders:
        for (name, _), status in zip(requests, senders.map(lambda one: answer_to(watched.address, one[1]), requests)):
            statuses[status] += 1
            memory.append(watched.memory_mb())
            if not good(status):
                lost.append(f"{name}: {status}")
    lost += [line.strip() for line in watched.printed[printed:] if "Traceback" in line]
    lost += [f"/health: {status}" for status in watched.failed[failed:]]
    if watched.slowest_s > 1:
        lost.append(f"/health: after {watched.slowest_s:.1f} s")
    quarter = len(requests) // 4
    earlier, later = median(memory[quarter : 2 * quarter + 1]), median(memory[-quarter - 1 :])
    if len(requests) >= ENOUGH and later > 1.1 * earlier:
        lost.append(f"memory: {earlier:.0f} MB in the second quarter, {later:.0f} MB in the last")
    return {
        "tried": len(requests),
        "survived": len(requests) - len(lost),
        "lost": lost,
        "statuses": dict(statuses),
        "slowest_health_s": round(watched.slowest_s, 3),
        "late_s": round(watched.late_s, 3),
        "memory_mb": [round(memory[0]), round(max(memory)), round(watched.memory_mb())],
        "memory_of_quarters_mb": [round(earlier), round(later)],
    }


def hostile_requests(count: int, clients: int, seed: int) -> dict[str, dict[str, Any]]:
    """Runs both kinds against one service, and returns a row for each."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, watched_service(Path(folder)) as watched:
        for i in range(50):
            add = multipart("/v1/items", [file_part(PICTURE + bytes(i)), field_part(b"id", b"i%d" % i)])
            if (status := answer_to(watched.address, add)) != "201":
                raise SystemExit(f"the service does not work: {status} for a picture; {watched.printed}")
        rows = {"targeted requests": survived(watched, [*targeted()], 1)}
        random_ones = [(f"malformed {i}", malformed(draw)) for i in range(count)]
        return rows | {"malformed requests": survived(watched, random_ones, clients)}


def main(options: Options) -> None:
    rows = hostile_requests(options.malformed, options.clients, options.seed)
    print(f"{'requests':20} {'tried':>6} {'survived':>8} {'lost':>5} {'health':>8} {'MB before, peak, after':>24}")
    for name, row in rows.items():
        memory = ", ".join(map(str, row["memory_mb"]))
        counts = (
            f"{row['tried']:6} {row['survived']:8} {len(row['lost']):5} {row['slowest_health_s']:6.2f} s {memory:>24}"
        )
        print(f"{name:20} {counts}")
        for line in row["lost"][:20]:
            print(f"  {line}")
        print(f"  answers: {row['statuses']}")
    record(rows, "hostile_requests.py", options.note)


def record(rows: dict[str, dict[str, Any]], script: str, note: str) -> None:
    """Appends the rows to the file of results. `script`: whose command line made them."""
    more = stamp("cpu", script) | ({"note": note} if note else {})
    append(OUT, [{"requests": name, **row, **more} for name, row in rows.items()])


if __name__ == "__main__":
    main(tyro.cli(Options))
