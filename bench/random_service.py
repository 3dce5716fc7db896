"""Serve a model with random weights through `vlp serve`, for search_latency.py.

How long the service takes does not depend on what its model has learned; what it finds does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from fastvlp.data.tokenize import Tokenizer
from fastvlp.exporters.export import export
from fastvlp.model.model import VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import small, two_towers, with_tokenizer

WORDS = [
    *("a", "the", "two", "some", "red", "small", "old", "young", "man", "woman", "dog", "bird", "child", "street"),
    *("water", "grass", "sits", "runs", "holds", "looks", "beside", "under", "near", "with", "and", "of", "in", "on"),
]


def random_texts(number: int, seed: int) -> list[str]:
    """Texts of 6 to 18 random words, about as long as captions of photographs."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(6, 19))) for _ in range(number)]


def export_random_model(folder: Path, texts: Sequence[str], width: int) -> Path:
    """Exports two towers of the size `small` with a joint space of `width` and a tokenizer trained on the texts."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([*texts, *texts])  # a word that occurs once would stay in pieces
    model = VLModel(with_tokenizer(two_towers(small(), width=width), tokenizer))
    save_model(folder / "run", model, tokenizer, {"name": "random"})
    export(folder / "run", folder / "export")
    return folder / "export"


class Client:
    """A client with one connection that stays open. It takes a quarter of a millisecond a request, httpx a whole one."""

    def __init__(self, address: str):
        self.connection = HTTPConnection(urlsplit(address).netloc, timeout=60)

    def request(self, path: str, payload: Mapping[str, Any] | None = None) -> bytes:
        """The body of the answer to a GET, or to a POST of the payload."""
        body = None if payload is None else json.dumps(payload)
        self.connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
        response = self.connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise SystemExit(f"{path}: the service answers {response.status}, {content.decode()}")
        return content

    def metrics(self) -> dict[str, float]:
        """The numbers of /metrics, by name and labels."""
        lines = re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", self.request("/metrics").decode(), re.M)
        return {name: float(value) for name, value in lines}


@contextmanager
def serving(model: Path, index: Path, threads: int) -> Iterator[Client]:
    """Runs `vlp serve` in a process of its own, and yields a client of it."""
    options = [str(model), "--index", str(index), "--port", "0", "--device", "cpu", "--threads", str(threads)]
    command = [sys.executable, "-m", "fastvlp", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().partition("  ")[0]
            if not address.startswith("http"):
                raise SystemExit(f"the service did not start; see above, or run: {' '.join(command)}")
            client = Client(address)
            yield client
            client.connection.close()
        finally:
            server.terminate()
