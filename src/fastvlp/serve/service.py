"""The service behind the routes. It embeds, captions, answers and scores matches in batches, and reads and changes the
index."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from starlette.requests import Request
from torch import Tensor

from fastvlp.data.records.decode import open_image
from fastvlp.data.streams import blocks
from fastvlp.data.tokenize import Reading
from fastvlp.errors import UserError
from fastvlp.search.calibration import Calibration
from fastvlp.search.checks import EngineError, Where
from fastvlp.search.embedder import Embedder, Unreadable
from fastvlp.search.engines.interface import Hit, IndexEngine, Item
from fastvlp.search.pictures import PictureStore
from fastvlp.search.thumbnails import thumbnail
from fastvlp.serve.batcher import Batcher, InputError, Lane
from fastvlp.serve.bodies import M, read_body
from fastvlp.serve.limits import Limits, Memory, Refusal, bad_request
from fastvlp.serve.monitoring import Metrics

T = TypeVar("T")
# `Limits.batch` counts pictures; for texts, each unit of it stands for this many tokens.
TOKENS = 64
# Seconds after which it is read again what the index's cosines mean: another process may have built it anew.
CALIBRATION_S = 60.0
# Seconds to wait for the index to count its items.
COUNT_S = 1.0


class Service:
    """Runs a model in a thread that batches requests, an index in a thread of its own, and picture decoding in several threads.

    Args:
        embedder: The model.
        index: The index; None if the service has no search.
        pictures: Pictures of the items of the index; None if there are none.
        limits: Limits of requests.

    All methods raise Refusal for a request that cannot be answered.
    """

    def __init__(self, embedder: Embedder, index: IndexEngine | None, pictures: PictureStore | None, limits: Limits):
        self.embedder, self.index, self.pictures, self.limits = embedder, index, pictures, limits
        embedder.max_pixels = limits.pixels
        self.name = str(embedder.card.get("name", "fastvlp"))
        self.metrics = Metrics()
        self.batcher = Batcher(
            model_lanes(embedder, limits.batch),
            window_s=limits.window_ms / 1000,
            max_waiting=limits.waiting,
            on_batch=self.metrics.batch,
        )
        self._calibrated: tuple[float, Calibration | None] = (-math.inf, None)
        self.memory = Memory(limits.held_mb * 1e6)
        self._readers = ThreadPoolExecutor(2, "read")
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        # One thread makes all calls of the index, so engines need not be thread-safe. Searches that wait share a call.
        self._engine = Batcher(
            {
                "search": Lane(run=lambda searches: search_together(self._index, searches), budget=limits.batch),
                "index": Lane(run=lambda calls: [call(self._index) for call in calls], budget=1),
            },
            window_s=0.0,
            max_waiting=2 * limits.requests,
            on_batch=self.metrics.batch,
        )

    def close(self) -> None:
        """Ends all threads, and closes the index."""
        self.batcher.close()
        self._decoders.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self._engine.close()
        if self.index is not None:
            self.index.close()

    def require(self, ability: str) -> None:
        """Raises Refusal if the model does not have an ability."""
        if ability not in self.embedder.can:
            abilities = ", ".join(sorted(self.embedder.can))
            raise Refusal(404, "not_supported", f"{self.name} cannot {ability}; it can {abilities}")

    async def read(self, kind: type[M], request: Request) -> M:
        """Reads the body of a request."""
        return await read_body(kind, request, self.limits, self._readers)

    def decode(self, data: bytes) -> Tensor:
        """Decodes a picture within the memory that all requests have. Called in a thread."""
        with self.memory.decoding(decoded_bytes(data)):
            return self.embedder.pixels([data])

    async def pixels(self, pictures: Sequence[bytes]) -> list[Tensor]:
        """Decodes pictures to the model's input, uint8 [3 size size] each."""
        self.check_count(pictures)
        loop = asyncio.get_running_loop()
        decoded = [loop.run_in_executor(self._decoders, self.decode, data) for data in pictures]
        try:
            return [pixels[0] for pixels in await asyncio.gather(*decoded)]
        except Unreadable as error:
            raise bad_request(error.reason, "unreadable_picture") from error

    async def images(self, pixels: Sequence[Tensor]) -> np.ndarray:
        """Embeds pictures: unit vectors [n E]."""
        self.require("embed")
        if not pixels:
            return np.empty((0, self.embedder.width), np.float32)
        return np.array(await self.batcher.submit("images", pixels))

    async def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, list[Reading]]:
        """Embeds texts: unit vectors [n E], and how each was read."""
        self.require("embed")
        if not texts:
            return np.empty((0, self.embedder.width), np.float32), []
        readings = await self.readings(texts)
        lengths = [min(reading.tokens, self.embedder.max_length) for reading in readings]
        return np.array(await self.batcher.submit("texts", texts, lengths)), readings

    async def readings(self, texts: Sequence[str]) -> list[Reading]:
        """Says how each text is read."""
        self.check_count(texts)
        self.check_characters(texts)
        return await asyncio.to_thread(self.embedder.readings, texts)

    async def caption(self, pixels: Tensor) -> str:
        """Captions a picture."""
        self.require("caption")
        return str((await self.batcher.submit("caption", [pixels]))[0])

    async def answer(self, pixels: Tensor, question: str) -> str:
        """Answers a question about a picture."""
        self.require("answer")
        self.check_characters([question])
        return str((await self.batcher.submit("answer", [(pixels, question)]))[0])

    async def match(self, pixels: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        """Scores how well each picture fits its text."""
        self.require("match")
        self.check_characters(texts)
        return [float(score) for score in await self.batcher.submit("match", [*zip(pixels, texts)])]

    @property
    def _index(self) -> IndexEngine:
        if self.index is None:
            raise Refusal(404, "no_index", "this service has no index; start it with `vlp serve EXPORT --index INDEX`")
        return self.index

    async def call_index(self, call: Callable[[IndexEngine], T]) -> T:
        """Calls a function with the index, in the index's thread."""
        result: T = (await self._engine.submit("index", [call]))[0]
        return result

    async def search(self, vector: np.ndarray, k: int, where: Where | None = None) -> list[Hit]:
        """Finds the `k` items that are nearest to a vector [E], best first."""
        try:
            hits: list[Hit] = (await self._engine.submit("search", [(vector, k, where or {})]))[0]
        except InputError as bad:
            raise bad_request(bad.reason) from bad
        return hits

    async def item(self, id: str) -> Item:
        """Reads an item. Raises Refusal if the index does not have it."""
        items = await self.call_index(lambda index: index.get([id]))
        if not items:
            raise Refusal(404, "unknown_item", f"no item {id!r}")
        return items[0]

    async def count(self) -> int | None:
        """Counts the items of the index. Returns None if the index fails or is busy, because the model can still answer."""
        if self.index is None:
            return 0
        try:
            async with asyncio.timeout(COUNT_S):
                return await self.call_index(lambda index: index.count())
        except Exception:
            return None

    async def calibration(self) -> Calibration | None:
        """Returns what the index's cosines mean; None if it does not know."""
        read_at, calibration = self._calibrated
        if time.monotonic() - read_at > CALIBRATION_S:
            calibration = await self.call_index(lambda index: index.calibration())
            self._calibrated = time.monotonic(), calibration
        return calibration

    async def picture(self, id: str) -> bytes | None:
        """Returns the thumbnail of an item; None if there is none."""
        if self.pictures is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._decoders, self.pictures.get, id)

    async def with_pictures(self, ids: Sequence[str]) -> list[str]:
        """Returns those of some items that have a thumbnail."""
        pictures = self.pictures
        return [] if pictures is None else await asyncio.to_thread(lambda: [id for id in ids if pictures.has(id)])

    async def add(self, id: str, vector: np.ndarray, info: Mapping[str, Any], data: bytes) -> None:
        """Adds or replaces an item. Searches find it as soon as this returns.

        Args:
            id: Id of the item.
            vector: Vector [E] of its picture.
            info: Fields of the item.
            data: Its picture, encoded.
        """

        def shrink() -> bytes:
            with self.memory.decoding(decoded_bytes(data)):
                return thumbnail(data, max_pixels=self.limits.pixels)

        small = await asyncio.get_running_loop().run_in_executor(self._decoders, shrink)

        def add(index: IndexEngine) -> None:
            # The index comes first: if it refuses the item, the picture of an older item with this id must not change.
            index.add([id], vector[None], [info])
            if self.pictures is not None:
                self.pictures.put(id, small)

        await self.call_index(add)

    async def remove(self, id: str) -> bool:
        """Deletes an item with its picture. Returns whether there was one."""

        def remove(index: IndexEngine) -> bool:
            deleted = index.delete([id]) > 0
            if deleted and self.pictures is not None:
                self.pictures.delete(id)
            return deleted

        return await self.call_index(remove)

    async def match_hits(self, hits: Sequence[Hit], text: str) -> dict[str, float]:
        """Scores how well the picture of each hit fits a text, by id. Hits without a picture are left out."""
        pictures = {hit.id: data for hit in hits if (data := await self.picture(hit.id)) is not None}
        pixels = [
            pixels
            for part in blocks(len(pictures), self.limits.inputs)
            for pixels in await self.pixels([*pictures.values()][part])
        ]
        return dict(zip(pictures, await self.match(pixels, [text] * len(pictures))))

    def check_count(self, inputs: Sequence[Any]) -> None:
        """Raises Refusal if a request has too many inputs."""
        if len(inputs) > self.limits.inputs:
            raise bad_request(f"{len(inputs)} inputs; {self.limits.inputs} are allowed in a request", "too_many")

    def check_characters(self, texts: Sequence[str]) -> None:
        """Raises Refusal if a text is too long."""
        longest = max(map(len, texts), default=0)
        if longest > self.limits.characters:
            raise bad_request(f"a text of {longest} characters; {self.limits.characters} are allowed", "too_long")


def decoded_bytes(data: bytes) -> int:
    """Estimates the most memory that decoding a picture takes, from its header."""
    try:
        with open_image(data) as image:
            return image.width * image.height * (8 if image.format in ("JPEG", "MPO") else 16)
    except Exception:  # whatever decoders raise for damaged bytes; they will again
        return 0


def search_together(index: IndexEngine, searches: Sequence[tuple[np.ndarray, int, Where]]) -> list[list[Hit]]:
    """Searches an index, with one call for all searches that have the same number of hits and the same filter.

    Args:
        index: The index to search in.
        searches: The vector [E], the number of hits and the filter of each search.

    Returns:
        The hits of each search.
    """
    alike: dict[str, list[int]] = {}
    for row, (_, k, where) in enumerate(searches):
        alike.setdefault(repr((k, sorted(where.items()))), []).append(row)
    results: list[list[Hit]] = [[] for _ in searches]
    for rows in alike.values():
        _, k, where = searches[rows[0]]
        try:
            answers = index.search(np.stack([searches[row][0] for row in rows]), k, where)
        except EngineError:
            raise
        except UserError as error:
            raise InputError(rows[0], str(error)) from error
        for row, hits in zip(rows, answers):
            results[row] = hits
    return results


def model_lanes(embedder: Embedder, batch: int) -> dict[str, Lane]:
    """Returns a lane for each kind of work of a model. Slow kinds have smaller batches, because other requests wait meanwhile.

    Args:
        embedder: The model.
        batch: Number of pictures in a batch, or of texts with 64 tokens (`Limits.batch`).
    """

    def with_texts(method: Callable[[Tensor, list[str]], Iterable[Any]]) -> Callable[[list[Any]], Iterable[Any]]:
        return lambda rows: method(torch.stack([pixels for pixels, _ in rows]), [text for _, text in rows])

    return {
        "texts": Lane(run=embedder.texts, budget=batch * TOKENS),
        "images": Lane(run=lambda rows: embedder.images(torch.stack(rows)), budget=batch),
        "caption": Lane(run=lambda rows: embedder.caption(torch.stack(rows)), budget=max(1, batch // 4)),
        "answer": Lane(run=with_texts(embedder.answer), budget=max(1, batch // 4)),
        "match": Lane(run=with_texts(embedder.match), budget=max(1, batch // 2)),
    }


def random_direction(width: int, seed: int) -> np.ndarray:
    """Draws a unit vector [E]."""
    drawn = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


def picture_id(data: bytes) -> str:
    """Returns the id for a picture that is added without one: a hash of its bytes."""
    return hashlib.sha256(data).hexdigest()[:32]
