"""A model without weights, whose results are hashes of its inputs, and an index in memory."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

from fastvlp.batch import Record
from fastvlp.data.records.decode import DecodeError, decode
from fastvlp.data.records.transform import Transform
from fastvlp.data.tokenize import Reading
from fastvlp.search.calibration import Calibration
from fastvlp.search.checks import check_where
from fastvlp.search.embedder import Unreadable
from fastvlp.search.engines.interface import Hit, Item, Stamp
from fastvlp.search.pictures import PictureFolder
from fastvlp.serve.api import create_app
from fastvlp.serve.connections import make_server

COLOURS = ("red", "green", "blue", "white")


def hashed(data: bytes, width: int) -> np.ndarray:
    """A unit vector."""
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    drawn = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


class StandinEmbedder:
    """A text's vector is its words'; a picture's is that of the name of its mean colour, so that "red" finds red."""

    width, fingerprint, max_pixels, max_length = 16, "f" * 32, 10**9, 32
    card: ClassVar[dict[str, Any]] = {"name": "standin"}
    colours: ClassVar = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    chinese: ClassVar = {"红色": "red", "绿色": "green", "蓝色": "blue", "白色": "white"}

    def __init__(self, can: Sequence[str] = ("embed", "caption", "answer", "match")):
        self.can = frozenset(can)
        self.languages = ["en", "zh"]
        self.transform = Transform(size=8)
        self.threads: set[int] = set()
        self.batches: list[int] = []
        self.running = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def _seen(self, rows: Sequence[Any]) -> None:
        self.running.set()
        self.gate.wait(20)
        self.threads.add(threading.get_ident())
        self.batches.append(len(rows))

    def pixels(self, pictures: Sequence[bytes]) -> Tensor:
        read = []
        for i, data in enumerate(pictures):
            try:
                record = Record(key="", images=(data,), info={})
                read.append(decode(record, self.transform, max_pixels=self.max_pixels).images[0])
            except DecodeError as error:
                raise Unreadable(i, error.reason) from error
        return torch.stack(read)

    def colour(self, pixels: Tensor) -> str:
        mean = pixels.float().mean((1, 2)).numpy()
        return min(self.colours, key=lambda name: float(np.abs(mean - self.colours[name]).sum()))

    def images(self, pixels: Tensor) -> np.ndarray:
        self._seen(pixels)
        # Two pictures of one colour are similar, not equal.
        parts = [
            hashed(self.colour(p).encode(), self.width) + 0.2 * hashed(p.numpy().tobytes(), self.width) for p in pixels
        ]
        return np.stack([part / np.linalg.norm(part) for part in parts])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self._seen(texts)
        vectors = []
        for text in texts:
            words = [self.chinese.get(word, word) for word in text.split()] or [""]
            total = np.sum([hashed(word.encode(), self.width) for word in words], axis=0)
            vectors.append(total / np.linalg.norm(total))
        return np.stack(vectors)

    def readings(self, texts: Sequence[str]) -> list[Reading]:
        """A text of more than 30 words is cut; words with a q are unknown."""
        words = [text.split() for text in texts]
        return [Reading(2 + len(one), " ".join(one[30:]), [word for word in one[:30] if "q" in word]) for one in words]

    def caption(self, pixels: Tensor) -> list[str]:
        self._seen(pixels)
        return [f"a {self.colour(one)} picture" for one in pixels]

    def answer(self, pixels: Tensor, questions: Sequence[str]) -> list[str]:
        self._seen(pixels)
        return [self.colour(one) for one in pixels]

    def match(self, pixels: Tensor, texts: Sequence[str]) -> np.ndarray:
        """1 where the text names the colour."""
        self._seen(pixels)
        return np.array([self.colour(one) in text.split() for one, text in zip(pixels, texts)], dtype=np.float32)


class StandinIndex:
    """Exact search in memory."""

    stamp = Stamp(fingerprint=StandinEmbedder.fingerprint, width=StandinEmbedder.width)

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibrated = calibration
        self.items: dict[str, Item] = {}
        self.closed = False

    def add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Any]]) -> None:
        self.items |= {id: Item(id, vector, dict(info)) for id, vector, info in zip(ids, vectors, infos)}

    def delete(self, ids: Sequence[str]) -> int:
        return sum(self.items.pop(id, None) is not None for id in ids)

    def search(
        self, vectors: np.ndarray, k: int, where: Mapping[str, Any] | None = None, offset: int = 0
    ) -> list[list[Hit]]:
        choices = check_where(where)
        kept = [
            item
            for item in self.items.values()
            if all(item.info.get(name) in values for name, values in choices.items())
        ]
        hits = [[Hit(item.id, float(vector @ item.vector), item.info) for item in kept] for vector in vectors]
        return [sorted(row, key=lambda hit: -hit.score)[offset : offset + k] for row in hits]

    def calibration(self) -> Calibration | None:
        return self.calibrated

    def count(self) -> int:
        return len(self.items)

    def get(self, ids: Sequence[str]) -> list[Item]:
        return [self.items[id] for id in ids if id in self.items]

    def close(self) -> None:
        self.closed = True


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address at which `app` answers over a real socket of this machine."""
    server = make_server(app, app.state.service.limits, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def opened(folder: Path, embedder: StandinEmbedder | None = None, **options: Any) -> TestClient:
    """A client of a service of these, whose 500 is an answer."""
    app = create_app(
        embedder or StandinEmbedder(),
        options.pop("index", StandinIndex()),
        pictures=PictureFolder(folder / "pictures"),
        **options,
    )
    return TestClient(app, "http://localhost", raise_server_exceptions=False)


def refused(answer: Any, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"], answer.text


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(
    colour: tuple[int, int, int], side: int = 32, format: str = "PNG", shape: tuple[int, int] | None = None
) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", shape or (side, side), colour).save(file, format)
    return file.getvalue()


def shade(colour: str, i: int) -> bytes:
    """The i-th picture of about that colour."""
    rgb = [abs(value - 2 * i) for value in StandinEmbedder.colours[colour]]
    return picture((rgb[0], rgb[1], rgb[2]))
