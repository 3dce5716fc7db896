"""The states of captions by a frozen text encoder: of every caption of a split, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice

from torch import Tensor

from fastvlp.data.records.interface import Records
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError
from fastvlp.data.state_store import Computed, StateStore
from fastvlp.data.states_file import EntryShape, StatesFile
from fastvlp.data.tokenize import Tokenizer

# Texts that are encoded at a time, and among how many they are sorted by length.
ROWS, SORTED = 256, 8192


@dataclass(frozen=True, kw_only=True)
class TextStore:
    """The store of the states of texts.

    Attributes:
        store: opens files of states.
        encode: ids [B L] and lengths [B] of texts on the CPU -> states of each, [S D] on the CPU.
        states: how many states each of them has, S.
    """

    store: StateStore
    encode: Callable[[Tensor, Tensor], list[Tensor]]
    states: Callable[[Tensor, Tensor], list[int]]

    def open(self, shards: Records, tokenizer: Tokenizer, field: str, max_length: int) -> StatesFile | None:
        """The states of all captions in a field of each record, one record's after the other's (`StatesFile.of_record`). None
        where they are not stored."""

        def captions() -> Iterator[list[str]]:
            for i in range(len(shards)):
                texts: list[str] = []
                # Making a batch of such a record raises the error.
                with suppress(RecordError):
                    texts = usable_captions(shards.info(i), field)
                yield texts

        def shape() -> EntryShape:
            counts: list[int] = []
            states: list[int] = []

            def texts() -> Iterator[str]:
                for own in captions():
                    counts.append(len(own))
                    yield from own

            stream = texts()
            while part := [*islice(stream, SORTED)]:
                states += self.states(*tokenizer.encode(part, max_length))
            return EntryShape(states, [*accumulate(counts, initial=0)])

        def compute(entries: Sequence[int]) -> Iterator[Computed]:
            wanted = {*entries}
            last = max(entries, default=-1)
            texts = enumerate(text for own in captions() for text in own)
            wanted_texts = ((i, text) for i, text in islice(texts, last + 1) if i in wanted)
            while part := sorted(islice(wanted_texts, SORTED), key=lambda one: len(one[1])):
                for rows in (part[first : first + ROWS] for first in range(0, len(part), ROWS)):
                    states = self.encode(*tokenizer.encode([text for _, text in rows], max_length))
                    yield from (Computed(i, own) for (i, _), own in zip(rows, states, strict=True))

        about = {"tokenizer": tokenizer.fingerprint, "field": field, "max_length": max_length}
        return self.store.open(shards, about, shape, compute)
