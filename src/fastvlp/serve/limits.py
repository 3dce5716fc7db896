"""Limits of requests, and the exception for a request that is refused. Nothing here imports torch or a web framework."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the service. A request over a limit gets 4xx; where the service is full or slow, it gets 503, with the time
    after which to try again."""

    body_mb: float = 24.0
    """Megabytes that a request may have."""
    held_mb: float = 512.0
    """Megabytes that all requests together may have that are being read or answered, with the pictures that are being
    decoded for them. A picture that needs more than all of it is decoded alone."""
    requests: int = 256
    """Requests that may be read or answered at the same time."""
    connections: int = 512
    """Connections that may be open; one more ends the one that has been idle for longest."""
    idle_s: float = 10.0
    """Seconds that a connection may take to send the head of a request, and that it may be idle."""
    waiting: int = 512
    """Texts and pictures that may wait for the model."""
    inputs: int = 64
    """Texts, pictures or pairs that one request may have."""
    characters: int = 2000
    """Characters that a text may have."""
    pixels: int = 40_000_000
    """Pixels that a picture may have; they are read from its header before anything is decoded."""
    results: int = 1000
    """How deep a search can be paged: the most that offset and limit may be together."""
    seconds: float = 30.0
    """Seconds that a request may take to arrive, and again to be answered."""
    window_ms: float = 3.0
    """Milliseconds that a request waits for others to share a batch with, if the batch before it was shared."""
    batch: int = 32
    """Pictures of a batch, or texts of 64 tokens; of shorter texts a batch has more."""


class Memory:
    """Bytes that are held for requests: bodies, and decoded pictures. Threads may use it."""

    def __init__(self, limit: float):
        self.limit, self.held, self._decoding = limit, 0, 0
        self._changed = threading.Condition()

    def add(self, count: int) -> None:
        """Counts bytes of a body; fewer with a negative number."""
        with self._changed:
            self.held += count
            self._changed.notify_all()

    @contextmanager
    def decoding(self, count: int) -> Iterator[None]:
        """Waits until there is room for the bytes of a picture, or no other is decoded."""
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
        retry_s: Seconds after which it is worth trying again; None where it is not.
    """

    def __init__(self, status: int, code: str, message: str, retry_s: int | None = None):
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.retry_s = status, code, message, retry_s

    def __str__(self) -> str:
        return self.message


def bad_request(message: str, code: str = "invalid_request") -> Refusal:
    """Returns a refusal with status 400: its sender can mend the request."""
    return Refusal(400, code, message)
