"""Counter-based random numbers: what is drawn for a row is a function of (seed, index, salt), never of its neighbours.

A generator with state would make the masks depend on batch size, padding, rank and device. Here each number is the hash
of its own address (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"); the mixer is splitmix64
(Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK64 = 2**64 - 1


def _signed(x: int) -> int:
    x &= _MASK64
    return x - 2**64 if x >= 2**63 else x


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def hash64(*parts: int) -> int:
    """A hash of the integers in their order, in [0, 2**63): it fits an int64 tensor and seeds any generator."""
    h = _GOLDEN
    for part in parts:
        h = _mix((_mix(h) + _GOLDEN * (part + 1)) & _MASK64)
    return h >> 1


def _shift(x: Tensor, n: int) -> Tensor:
    # >> on int64 copies the sign bit; the mask makes the shift logical.
    return (x >> n) & (2 ** (64 - n) - 1)


def mix64(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on an int64 tensor of any shape, the 64 bits read as unsigned."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def hash64_rows(*parts: int | Tensor) -> Tensor:
    """`hash64` of many rows at once, int64 [B]: a part is one integer for all of them, or int64 [B]."""
    h = torch.tensor(_signed(_GOLDEN))
    for part in parts:
        x = part if isinstance(part, Tensor) else torch.tensor(_signed(part))
        h = mix64(mix64(h) + (x + 1) * _signed(_GOLDEN))
    return _shift(h, 1)


def sample_indices(count: int, most: int, seed: int) -> Iterator[int]:
    """Indices below `count` in rising order: one drawn from each of `most` equal parts, or all where there are no more."""
    if count <= most:
        yield from range(count)
        return
    for part in range(most):
        first, end = part * count // most, (part + 1) * count // most
        yield first + hash64(seed, part) % (end - first)


def bits(seed_B: Tensor, shape_after_B: tuple[int, ...], salt: int) -> Tensor:
    """64 random bits as int64 [B *shape]; the value at [b, i, ...] depends on (seed_b, (i, ...), salt) alone."""
    h = mix64(mix64(seed_B) + _signed(_GOLDEN * (salt + 1)))
    for n in shape_after_B:
        step_n = torch.arange(1, n + 1, device=seed_B.device) * _signed(_GOLDEN)
        h = mix64(h[..., None] + step_n)
    return h


def uniform(seed_B: Tensor, shape_after_B: tuple[int, ...], salt: int) -> Tensor:
    """float32 [B *shape] in [0, 1), multiples of 2**-24; the same numbers on every device.

    Args:
        seed_B: int64 [B], `Batch.seed`.
        shape_after_B: growing any of these sizes adds numbers and changes none.
        salt: one constant for each use, so that two draws of one row are independent.
    """
    top24 = (bits(seed_B, shape_after_B, salt) >> 40) & (2**24 - 1)
    return top24.to(torch.float32) * 2.0**-24
