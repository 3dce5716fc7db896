"""What the routes ask for: vectors, captions, answers and match scores in batches, and items of the index."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.search.checks import Where
from fastvlp.search.embedder import Embedder, Unreadable
from fastvlp.search.engines.interface import EngineError, Hit, IndexEngine, Item
from fastvlp.search.pictures import PictureStore, thumbnail
from fastvlp.serve.batcher import Batcher, InputError, Lane
from fastvlp.serve.limits import Limits, Refusal, refuse
from fastvlp.serve.monitoring import Metrics

T = TypeVar("T")
# Tokens that a text of `Limits.batch` stands for.
TOKENS = 64
# How long to wait for the index to say how many items it has.
COUNT_S = 1.0


class Service:
    """The model behind a batcher, the index behind a thread of its own; decoding has threads too.

    `index` is None where only embeddings are served.
    """

    def __init__(self, embedder: Embedder, index: IndexEngine | None, pictures: PictureStore | None, limits: Limits):
        self.embedder, self.index, self.pictures, self.limits = embedder, index, pictures, limits
        embedder.max_pixels = limits.pixels
        self.name = str(embedder.card.get("name", "fastvlp"))
        self.metrics = Metrics()
        self.batcher = Batcher(
            lanes(embedder, limits.batch),
            window_s=limits.window_ms / 1000,
            most_waiting=limits.waiting,
            watch=self.metrics.batch,
        )
        # Each decoder holds a picture of up to `Limits.pixels`.
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        # One thread is the one writer, and no client library has to be safe for several. Searches of a moment share a call.
        self._engine = Batcher(
            {
                "search": Lane(run=lambda asked: search_together(self._index, asked), budget=limits.batch),
                "index": Lane(run=lambda works: [work(self._index) for work in works], budget=1),
            },
            window_s=0.0,
            most_waiting=2 * limits.requests,
            watch=self.metrics.batch,
        )

    def close(self) -> None:
        self.batcher.close()
        self._decoders.shutdown(cancel_futures=True)
        self._engine.close()
        if self.index is not None:
            self.index.close()

    def need(self, ability: str) -> None:
        if ability not in self.embedder.can:
            known = ", ".join(sorted(self.embedder.can))
            raise Refusal(404, "not_supported", f"{self.name} cannot {ability}; it can {known}")

    async def pixels(self, pictures: Sequence[bytes]) -> list[Tensor]:
        """Each decoded as the model reads it, uint8 [3 size size]."""
        self.few(pictures)
        loop = asyncio.get_running_loop()
        read = [loop.run_in_executor(self._decoders, self.embedder.pixels, [data]) for data in pictures]
        try:
            return [pixels[0] for pixels in await asyncio.gather(*read)]
        except Unreadable as error:
            raise refuse(error.reason, "unreadable_picture") from error

    async def images(self, pixels: Sequence[Tensor]) -> np.ndarray:
        """Unit vectors [n E]."""
        self.need("embed")
        if not pixels:
            return np.empty((0, self.embedder.width), np.float32)
        return np.array(await self.batcher.ask("images", pixels))

    async def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Unit vectors [n E], and how many tokens were read."""
        self.need("embed")
        if not texts:
            return np.empty((0, self.embedder.width), np.float32), 0
        lengths = await self.lengths(texts)
        return np.array(await self.batcher.ask("texts", texts, lengths)), sum(lengths)

    async def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        self.few(texts)
        self.short(texts)
        return await asyncio.to_thread(self.embedder.lengths, texts)

    async def caption(self, pixels: Tensor) -> str:
        self.need("caption")
        return (await self.batcher.ask("caption", [pixels]))[0]

    async def answer(self, pixels: Tensor, question: str) -> str:
        self.need("answer")
        self.short([question])
        return (await self.batcher.ask("answer", [(pixels, question)]))[0]

    async def match(self, pixels: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        """How well each picture fits its text."""
        self.need("match")
        self.short(texts)
        return [float(score) for score in await self.batcher.ask("match", [*zip(pixels, texts)])]

    @property
    def _index(self) -> IndexEngine:
        if self.index is None:
            raise Refusal(404, "no_index", "this service has no index; start it with `vlp serve EXPORT --index INDEX`")
        return self.index

    async def indexed(self, work: Callable[[IndexEngine], T]) -> T:
        """`work` in the index's thread."""
        return (await self._engine.ask("index", [work]))[0]

    async def search(self, vector: np.ndarray, k: int, where: Where | None = None) -> list[Hit]:
        try:
            return (await self._engine.ask("search", [(vector, k, where or {})]))[0]
        except InputError as bad:
            raise refuse(bad.reason) from bad

    async def item(self, id: str) -> Item:
        """Raises Refusal for an item that the index does not have."""
        found = await self.indexed(lambda index: index.get([id]))
        if not found:
            raise Refusal(404, "unknown_item", f"no item {id!r}")
        return found[0]

    async def count(self) -> int | None:
        """Items of the index; None where it fails or is busy: the model answers all the same."""
        if self.index is None:
            return 0
        try:
            async with asyncio.timeout(COUNT_S):
                return await self.indexed(lambda index: index.count())
        except Exception:
            return None

    async def picture(self, id: str) -> bytes | None:
        """What the index keeps of the item's picture."""
        if self.pictures is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._decoders, self.pictures.get, id)

    async def add(self, id: str, vector: np.ndarray, info: Mapping[str, Any], data: bytes) -> None:
        """The item is in the index when this returns."""
        shrink = partial(thumbnail, data, max_pixels=self.limits.pixels)
        small = await asyncio.get_running_loop().run_in_executor(self._decoders, shrink)

        def add(index: IndexEngine) -> None:
            # First: what it refuses must not change the picture of an item that it has.
            index.add([id], vector[None], [info])
            if self.pictures is not None:
                self.pictures.put(id, small)

        await self.indexed(add)

    async def remove(self, id: str) -> bool:
        """Whether there was such an item."""

        def remove(index: IndexEngine) -> bool:
            found = index.delete([id]) > 0
            if found and self.pictures is not None:
                self.pictures.delete(id)
            return found

        return await self.indexed(remove)

    async def matches(self, hits: Sequence[Hit], text: str) -> dict[str, float]:
        """How well the picture of each hit fits the text, by id; hits without a picture are left out."""
        found = [(hit.id, await self.picture(hit.id)) for hit in hits]
        kept = [(id, data) for id, data in found if data is not None]
        pixels = [
            pixels
            for first in range(0, len(kept), self.limits.inputs)
            for pixels in await self.pixels([data for _, data in kept[first : first + self.limits.inputs]])
        ]
        scores = await self.match(pixels, [text] * len(kept))
        return {id: score for (id, _), score in zip(kept, scores)}

    def few(self, inputs: Sequence[Any]) -> None:
        if len(inputs) > self.limits.inputs:
            raise refuse(f"{len(inputs)} inputs; {self.limits.inputs} are allowed in a request", "too_many")

    def short(self, texts: Sequence[str]) -> None:
        longest = max(map(len, texts), default=0)
        if longest > self.limits.characters:
            raise refuse(f"a text of {longest} characters; {self.limits.characters} are allowed", "too_long")


def search_together(index: IndexEngine, asked: Sequence[tuple[np.ndarray, int, Where]]) -> list[list[Hit]]:
    """The hits of each search: one call of the index for those that differ in the vector alone."""
    alike: dict[str, list[int]] = {}
    for row, (_, k, where) in enumerate(asked):
        alike.setdefault(repr((k, sorted(where.items()))), []).append(row)
    found: list[list[Hit]] = [[] for _ in asked]
    for rows in alike.values():
        _, k, where = asked[rows[0]]
        try:
            answers = index.search(np.stack([asked[row][0] for row in rows]), k, where)
        except EngineError:
            raise
        except UserError as error:
            raise InputError(rows[0], str(error)) from error
        for row, hits in zip(rows, answers):
            found[row] = hits
    return found


def lanes(embedder: Embedder, batch: int) -> dict[str, Lane]:
    """The kinds of work of a model. Whatever writes or reads beside the picture takes smaller batches: others wait."""

    def beside(method: Callable[[Tensor, list[str]], Iterable[Any]]) -> Callable[[list[Any]], Iterable[Any]]:
        return lambda rows: method(torch.stack([pixels for pixels, _ in rows]), [text for _, text in rows])

    return {
        "texts": Lane(run=embedder.texts, budget=batch * TOKENS),
        "images": Lane(run=lambda rows: embedder.images(torch.stack(rows)), budget=batch),
        "caption": Lane(run=lambda rows: embedder.caption(torch.stack(rows)), budget=max(1, batch // 4)),
        "answer": Lane(run=beside(embedder.answer), budget=max(1, batch // 4)),
        "match": Lane(run=beside(embedder.match), budget=max(1, batch // 2)),
    }


def sample_direction(width: int, seed: int) -> np.ndarray:
    """A unit vector [E] in which nobody asked to look."""
    drawn = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


def picture_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
