"""Stored vectors of a teacher: of every image and caption of a split, computed once, for a student to learn from."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fastvlp.data.records.interface import Records
from fastvlp.data.records.transform import Transform
from fastvlp.data.state_store import StoreNote
from fastvlp.data.states_file import StatesFile
from fastvlp.data.stored_images import ImageStore
from fastvlp.data.stored_texts import TextStore
from fastvlp.data.tokenize import Tokenizer
from fastvlp.files import write_whole


class TeacherVectors(NamedTuple):
    """The vectors of a split, one a picture and one a caption."""

    images: StatesFile
    texts: StatesFile

    def of(self, record: int, caption: int) -> tuple[Tensor, Tensor]:
        """The vectors [E] of a record's picture and of one of its captions."""
        return self.images.entry(record)[0], self.texts.entry(self.texts.of_record(record)[caption])[0]


def seconds_of(note: StoreNote) -> float:
    """Returns the seconds that computing a file took. They are written beside it, for later runs."""
    if note.path is None:
        return 0.0
    beside = note.path.with_name(f"{note.path.name}.seconds")
    if note.seconds:
        with suppress(OSError):
            write_whole(beside, f"{note.seconds:.3f}\n".encode())
        return note.seconds
    with suppress(OSError, ValueError):
        return float(beside.read_text())
    return 0.0


@dataclass(frozen=True, kw_only=True)
class TeacherStore:
    """The store of a teacher's vectors, and the preprocessing of the teacher.

    Attributes:
        images: vectors of images.
        texts: vectors of captions.
        transform: makes the teacher's square of an image.
        tokenizer: the teacher's.
        max_length: tokens of a text, after which the teacher cuts it.
        trained_s: seconds that training the teacher took; None if it is not known.
        computing_s: seconds that computing the vectors of each split took, in this run or in an earlier one.
    """

    images: ImageStore
    texts: TextStore
    transform: Transform
    tokenizer: Tokenizer
    max_length: int
    trained_s: float | None = None
    computing_s: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The seconds that the teacher took in all: its training, if that is known, and its vectors of the splits that were
        opened."""
        return (self.trained_s or 0.0) + sum(self.computing_s)

    def open(self, shards: Records, captions: str) -> TeacherVectors:
        """The vectors of a split, computed now where they are not there yet. Raises UserError if they cannot be stored."""
        images = self.images.open(shards, self.transform)
        texts = self.texts.open(shards, self.tokenizer, captions, self.max_length)
        assert images is not None and texts is not None, "they are always stored"
        self.computing_s.extend(seconds_of(part.store.notes[-1]) for part in (self.images, self.texts))
        return TeacherVectors(images, texts)
