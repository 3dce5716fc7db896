"""Limits of requests, and the exception for a request that is refused. Nothing here imports torch or a web framework."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the service. A request that exceeds a limit gets a 4xx status. If the service is full or slow, a request gets
    503, with the time after which to try again."""

    body_mb: float = 24.0
    """Largest size of a request in megabytes."""
    held_mb: float = 512.0
    """Largest total size in megabytes of the requests that are being read or answered, and of their decoded pictures. A picture
    that is larger than this is decoded alone."""
    requests: int = 256
    """Largest number of requests that are read or answered at the same time."""
    connections: int = 512
    """Largest number of open connections; a further connection ends the one that has been idle for longest."""
    idle_s: float = 10.0
    """Seconds after which an idle connection is ended, and a connection that has not sent the headers of a request."""
    waiting: int = 512
    """Largest number of texts and pictures that wait for the model."""
    inputs: int = 64
    """Largest number of texts, pictures or pairs in a request."""
    characters: int = 2000
    """Largest number of characters in a text."""
    pixels: int = 40_000_000
    """Largest number of pixels of a picture. It is read from the picture's header, before anything is decoded."""
    results: int = 1000
    """Largest number of results of a search, over all pages: the sum of offset and limit."""
    seconds: float = 30.0
    """Seconds that a request may take to arrive, and seconds that it may take to be answered."""
    window_ms: float = 3.0
    """Milliseconds that a request waits for others to share a batch with, if the previous batch was shared."""
    batch: int = 32
    """Largest number of pictures, or of texts of 64 tokens, in a batch. A batch of shorter texts has more."""


class Memory:
    """Counts the bytes that requests use: their bodies and decoded pictures. Threads may share it."""

    def __init__(self, limit: float):
        self.limit, self.held, self._decoding = limit, 0, 0
        self._changed = threading.Condition()

    def add(self, count: int) -> None:
        """Adds the bytes of a body; a negative number subtracts them."""
        with self._changed:
            self.held += count
            self._changed.notify_all()

    @contextmanager
    def decoding(self, count: int) -> Iterator[None]:
        """Waits until there is room for the bytes of a picture, or until no other picture is being decoded."""
        with self._changed:
            self._changed.wait_for(lambda: not self._decoding or self.held + count <= self.limit)
            self.held += count
            self._decoding += 1
        try:
            yield
        finally:
            with self._changed:
                self.held -= count
                self._decoding -= 1
                self._changed.notify_all()


class Refusal(Exception):  # noqa: N818 (an answer, not a failure)
    """A request that is not answered as its sender wished.

    Attributes:
        status: Of HTTP.
        code: For programs.
        message: For people.
        retry_s: Seconds after which it is worth trying again; None if it is not.
    """

    def __init__(self, status: int, code: str, message: str, retry_s: int | None = None):
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.retry_s = status, code, message, retry_s

    def __str__(self) -> str:
        return self.message


def bad_request(message: str, code: str = "invalid_request") -> Refusal:
    """Returns a refusal with status 400: its sender can mend the request."""
    return Refusal(400, code, message)
