"""States of frozen encoders: computed once, stored beside the shards, and then read instead of pixels or words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastvlp.data.part_file import complete, open_part, part_of
from fastvlp.data.records.decode import StoredShape
from fastvlp.data.records.interface import Records
from fastvlp.data.states_file import (
    DamagedStatesError,
    Entries,
    EntryShape,
    StatesFile,
    StatesWriter,
    StateType,
)
from fastvlp.data.streams import bar
from fastvlp.errors import UserError

T = TypeVar("T")

# Raised when the same encoder and images give other states than before, or when the files change.
VERSION = 1
# Share of the free space that may be used without being asked for.
ROOM = 0.5
# Seconds between two lines of progress where there is no terminal.
SILENCE_S = 30.0
# Difference of stored states to those of the same image now, as a share of their length. Rounding is far below it.
CHANGED = 0.1


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    """Whether, where and how the states of frozen encoders are stored."""

    store: Literal["auto", "always", "never"] = "auto"
    """Compute the states of a frozen encoder once, store them, and read them from then on. auto does so if nothing in the run
    needs the pixels or words, the states are read more than once, and they fit into half of the free disk space."""
    folder: str | None = None
    """Folder of the files with states; by default the folder of the shards."""
    dtype: StateType = "fp16"
    """Number type in which states are stored."""


class StoreNote(NamedTuple):
    """A note that says whether the states of a split are stored.

    Attributes:
        what: `images` or `texts`.
        data: the shards; empty if it is the same of all.
        path: the file; None if states are not stored.
        entries: images or texts.
        size: bytes of the file.
        seconds: what computing them took; 0 where they were there already.
        reason: why they are not stored.
    """

    what: str
    data: str
    path: Path | None = None
    entries: int = 0
    size: int = 0
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if self.path is None:
            place = f"{self.data}: " if self.data else ""
            return f"{place}states of {self.what} by the frozen encoder are computed at each step: {self.reason}"
        how = f"computed in {self.seconds:.0f} s" if self.seconds else "computed before"
        return f"{self.data}: states of {self.entries} {self.what} are read from {self.path} ({self.size / 1e9:.2g} GB, {how})"


class NotStoredError(Exception):
    """States cannot be stored, for the reason that it says."""


@dataclass(frozen=True, kw_only=True)
class StateStore:
    """The stored states of one encoder, of any number of splits.

    Attributes:
        what: `images` or `texts`.
        about: what the states depend on besides what is encoded.
        width: numbers in a state.
        config: where they are stored, and how.
        reads: how many entries the run reads in all; None if nobody knows.
        notes: what was done, for the start of a run.
    """

    what: str
    about: Mapping[str, Any]
    width: int
    config: StatesConfig
    reads: float | None = None
    notes: list[StoreNote] = field(default_factory=list)

    def open(
        self,
        shards: Records,
        about: Mapping[str, Any],
        shape: Callable[[], EntryShape],
        compute: Callable[[Sequence[int]], Iterator[Computed]],
    ) -> StatesFile | None:
        """The states of a split, computed now where they are not there yet. None if the config leaves it to chance and
        there is no room, or no use.

        Args:
            about: what else they depend on, such as the size of the images.
            shape: how many states each entry has.
            compute: yields the states of these entries, in any order, and nothing for one that cannot be read.

        Raises UserError if they must be stored and cannot be.
        """
        whole = {"version": VERSION, "what": self.what, **self.about, **about, "dtype": self.config.dtype}
        whole["shards"] = shards.fingerprint
        try:
            path = self._path(shards, whole)
            stored, seconds = self._existing(path, whole, compute), 0.0
            if stored is None:
                entries = Entries(shape(), self.width, self.config.dtype, whole)
                self._check(path, entries)
                began = time.perf_counter()
                stored = self._compute(path, entries, compute, shards.url)
                seconds = time.perf_counter() - began
        except (NotStoredError, OSError) as error:
            reason = str(error) if isinstance(error, NotStoredError) else f"cannot write ({error.strerror or error})"
            if self.config.store == "always":
                raise UserError(f"{shards.url}: states of {self.what} cannot be stored: {reason}") from error
            self.notes.append(StoreNote(self.what, shards.url, reason=reason))
            return None
        size = path.stat().st_size
        self.notes.append(StoreNote(self.what, shards.url, path, len(stored), size, seconds))
        return stored

    def _path(self, shards: Records, whole: Mapping[str, Any]) -> Path:
        folder = Path(self.config.folder) if self.config.folder else shards.folder
        if folder is None:
            raise NotStoredError("the shards are on another machine; name a folder for the states with `states.folder`")
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        return folder / f"states-{digest[:16]}.safetensors"

    def _existing(
        self, path: Path, whole: Mapping[str, Any], compute: Callable[[Sequence[int]], Iterator[Computed]]
    ) -> StatesFile | None:
        """The file if it is there, whole, and of what the encoder gives now: its code or a library may have changed."""
        if not path.exists():
            return None
        try:
            stored = StatesFile(path)
            if stored.about != whole:
                raise DamagedStatesError("it is of other states")
            first = next((i for i in range(len(stored)) if i in stored), None)
            now = None if first is None else next(compute([first]), None)
            if first is not None and (now is None or _differ(stored.entry(first), now.states)):
                raise DamagedStatesError("the encoder gives other states now: its code or a library has changed")
        except (DamagedStatesError, UserError) as error:
            say(f"{path}: {error}; its states are computed again")
            path.unlink(missing_ok=True)
            return None
        return stored

    def _check(self, path: Path, entries: Entries) -> None:
        """Raises NotStoredError if it is not worth the space, or there is none."""
        if self.config.store == "auto" and self.reads is not None and self.reads < 2 * len(entries.shape.lengths):
            raise NotStoredError(f"the run reads few of the {self.what} twice")
        place = next(folder for folder in (path.parent, *path.parents) if folder.exists())
        if not os.access(place, os.W_OK):
            raise NotStoredError(f"{path.parent} is read-only; name another folder with `states.folder`")
        part = part_of(path)
        free = shutil.disk_usage(place).free + (part.stat().st_blocks * 512 if part.exists() else 0)
        if entries.size > free * (ROOM if self.config.store == "auto" else 1):
            raise NotStoredError(
                f"they take {entries.size / 1e9:.2g} GB, and {path.parent} has {free / 1e9:.2g} GB left"
            )

    def _compute(
        self, path: Path, entries: Entries, compute: Callable[[Sequence[int]], Iterator[Computed]], data: str
    ) -> StatesFile:
        with open_part(path, lambda: say(f"{path}: another process computes it; waiting")) as file:
            if file is not None:
                writer = StatesWriter(file, entries)
                missing = writer.missing()
                count, size = len(entries.shape.lengths), f"{entries.size / 1e9:.2g} GB"
                before = (
                    f"; {count - len(missing)} were computed before an interruption" if len(missing) < count else ""
                )
                say(f"{data}: computing the states of {count} {self.what} once, {size} in {path}{before}")
                for one in with_reports(compute(missing), len(missing), f"states of {self.what}"):
                    writer.put(one.entry, as_stored(one, self.config, self.what), one.image_shape)
                complete(file, path)
        return StatesFile(path)


class Computed(NamedTuple):
    """The states of one entry [S D], and how its image is stored."""

    entry: int
    states: Tensor
    image_shape: StoredShape = StoredShape(0, 0, 0)


def as_stored(one: Computed, config: StatesConfig, what: str) -> np.ndarray:
    """Raises UserError if a state cannot be stored in this type."""
    states = one.states.to(torch.float16 if config.dtype == "fp16" else torch.float32)
    if not bool(torch.isfinite(states).all()):
        finite = bool(torch.isfinite(one.states).all())
        remedy = (
            "they are beyond half precision: set `states.dtype` to fp32" if finite else "its weights may be damaged"
        )
        raise UserError(f"the frozen encoder's states of the {what} contain numbers that are not finite; {remedy}")
    return states.numpy()


def _differ(stored: Tensor, now: Tensor) -> bool:
    if stored.shape != now.shape:
        return True
    old, new = stored.double(), now.double()
    return bool((new - old).norm() > CHANGED * old.norm() + 1e-6)


def say(text: str) -> None:
    """A line on stderr."""
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def with_reports(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yields `items`, with a bar on a terminal, and elsewhere with a line now and then that says how long it still takes."""
    with bar() as progress:
        if not progress.disable:
            yield from progress.track(items, total=total, description=description)
            return
        began = last = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            now = time.perf_counter()
            if now - last > SILENCE_S:
                last, left = now, (now - began) / done * (total - done)
                say(f"{description}: {done} of {total}, {left / 60:.0f} minutes left")
