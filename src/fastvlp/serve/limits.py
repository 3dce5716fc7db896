"""What a request may ask for, and how it is told that it may not; nothing here imports torch or a web framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the service. What is over one gets 4xx; where the service is full or slow, 503 and when to try again."""

    body_mb: float = 24.0
    """Megabytes of a request."""
    held_mb: float = 512.0
    """Megabytes of all requests that are being read or answered."""
    requests: int = 256
    """Requests that are being read or answered."""
    waiting: int = 512
    """Texts and pictures that wait for the model."""
    inputs: int = 64
    """Texts, pictures or pairs of one request."""
    characters: int = 2000
    """Characters of a text."""
    pixels: int = 40_000_000
    """Pixels of a picture, read from its header before anything is decoded."""
    results: int = 1000
    """How deep a search can be paged: offset and limit together."""
    seconds: float = 30.0
    """Time of a request from its first byte to its answer; the same again for a slow sender."""
    window_ms: float = 3.0
    """How long a request waits for others to share a batch with, where the batch before it was shared."""
    batch: int = 32
    """Pictures of a batch, and texts of 64 tokens; shorter texts are more to a batch."""


class Refusal(Exception):  # noqa: N818 (an answer, not a failure)
    """An answer other than the one that was asked for. `retry_s`: when it is worth asking again."""

    def __init__(self, status: int, code: str, message: str, retry_s: int | None = None):
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.retry_s = status, code, message, retry_s

    def __str__(self) -> str:
        return self.message


def refuse(message: str, code: str = "invalid_request") -> Refusal:
    """What the sender can mend: 400."""
    return Refusal(400, code, message)
