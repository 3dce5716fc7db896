"""A model with random weights behind the real service, for what is timed there: how long it takes does not depend on what
it learned, what it finds does."""

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


def made_texts(number: int, seed: int) -> list[str]:
    """Of 6 to 18 words, about as long as captions of photographs."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(6, 19))) for _ in range(number)]


def made_export(folder: Path, texts: Sequence[str], width: int) -> Path:
    """Two towers of the size `small`, embedded in a space of `width`; a tokenizer of these texts."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([*texts, *texts])  # words seen once would stay pieces
    model = VLModel(with_tokenizer(two_towers(small(), width=width), tokenizer))
    save_model(folder / "run", model, tokenizer, {"name": "random"})
    export(folder / "run", folder / "export")
    return folder / "export"


class Client:
    """One connection that stays open. httpx takes a millisecond of its own for what takes this a quarter of one."""

    def __init__(self, address: str):
        self.connection = HTTPConnection(urlsplit(address).netloc, timeout=60)

    def ask(self, path: str, asked: Mapping[str, Any] | None = None) -> bytes:
        body = None if asked is None else json.dumps(asked)
        self.connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
        answer = self.connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{path}: the service answers {answer.status}, {said.decode()}")
        return said

    def measured(self) -> dict[str, float]:
        """What the service says of itself, by name."""
        found = re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", self.ask("/metrics").decode(), re.M)
        return {name: float(value) for name, value in found}


@contextmanager
def serving(model: Path, index: Path, threads: int) -> Iterator[Client]:
    """A client of `vlp serve` in a process of its own."""
    told = [str(model), "--index", str(index), "--port", "0", "--device", "cpu", "--threads", str(threads)]
    command = [sys.executable, "-m", "fastvlp", "serve", *told]
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
