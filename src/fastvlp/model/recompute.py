"""Work that is done again to save memory. It makes a step no more useful, so that it does not count in its FLOPs (PaLM, arXiv
2204.02311, appendix B)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

# Not a context variable: the backward pass of a GPU runs in a thread of its own.
_depth = 0


@contextmanager
def recomputing() -> Iterator[None]:
    """Around what is computed a second time, or for the first of two times."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_recomputing() -> bool:
    return _depth > 0


def computed_twice() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts in which torch.utils.checkpoint computes something for the first and for the second time."""
    return nullcontext(), recomputing()
