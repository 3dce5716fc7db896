"""Limits of requests, and the exception for a request that is refused. Nothing here imports torch or a web framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the service. A request over a limit gets 4xx; where the service is full or slow, it gets 503, with the time
    after which to try again."""

    body_mb: float = 24.0
    """Megabytes that a request may have."""
    held_mb: float = 512.0
    """Megabytes that all requests together may have that are being read or answered."""
    requests: int = 256
    """Requests that may be read or answered at the same time."""
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
