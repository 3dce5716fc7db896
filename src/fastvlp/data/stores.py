"""The stores of a run's frozen encoders. Apart from `pairs`, so that reading them does not load what makes batches."""

from __future__ import annotations

from typing import NamedTuple

from fastvlp.data.state_store import StoreNote
from fastvlp.data.stored_images import ImageStore
from fastvlp.data.stored_texts import TextStore
from fastvlp.data.teacher import TeacherStore


class Stored(NamedTuple):
    """The stores of the states of frozen encoders, the reasons if they are not stored, and the store of a teacher's vectors."""

    images: ImageStore | None = None
    texts: TextStore | None = None
    skipped: tuple[StoreNote, ...] = ()
    teacher: TeacherStore | None = None

    @property
    def notes(self) -> list[StoreNote]:
        """The notes about the states of the splits that were read."""
        taught = () if self.teacher is None else (self.teacher.images, self.teacher.texts)
        parts = (self.images, self.texts, *taught)
        opened = [note for part in parts if part is not None for note in part.store.notes]
        return [*self.skipped, *opened]
