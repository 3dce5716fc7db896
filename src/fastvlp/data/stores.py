"""The stores of a run's frozen encoders. Apart from `pairs`, so that reading them does not load what makes batches."""

from __future__ import annotations

from typing import NamedTuple

from fastvlp.data.state_store import StoreNote
from fastvlp.data.stored_images import ImageStore
from fastvlp.data.stored_texts import TextStore


class Stored(NamedTuple):
    """Where the states of frozen encoders are, and of which they are not stored."""

    images: ImageStore | None = None
    texts: TextStore | None = None
    skipped: tuple[StoreNote, ...] = ()

    @property
    def notes(self) -> list[StoreNote]:
        """What was done about the states of the splits that were read."""
        opened = [note for part in (self.images, self.texts) if part is not None for note in part.store.notes]
        return [*self.skipped, *opened]
