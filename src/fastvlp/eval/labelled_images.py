"""Images with classes: shards whose records say them, or folders that are called like them, and the names of the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlp.batch import Dropped
from fastvlp.data.records.decode import read_pixels
from fastvlp.data.records.interface import Records
from fastvlp.data.records.shards import RecordError
from fastvlp.data.sources.split_names import USUAL, usual_split
from fastvlp.data.splits import is_folder, place_in
from fastvlp.errors import UserError
from fastvlp.eval.class_files import read_classes
from fastvlp.eval.picture_files import PictureFiles, PictureFolder
from fastvlp.eval.public_sets import PUBLIC_SETS
from fastvlp.eval.split_reading import open_split, read_labels, say_itself


class LabelledImages(NamedTuple):
    """Images with their classes.

    Attributes:
        records: the images.
        names_of: the names of each class, by its label.
        label_I: index of each image's class, int64 [I].
        left_out: images of other classes, which a public set does not score.
    """

    records: Records
    names_of: Mapping[str, Sequence[str]]
    label_I: Tensor
    left_out: int


def open_labelled_images(data: str, split: str, classes: str | Path | None, label: str) -> LabelledImages:
    """The images of a split, or of a folder with a folder for each class, and their classes.

    Args:
        data: a folder of shards or of class folders, or with such a folder for each split.
        split: folder in `data`, if there is one of this name.
        classes: a file with the names of the classes, or a name in PUBLIC_SETS; by default the labels are the names.
        label: field of the records with the class.

    Raises UserError if an image has no class, or a class that is none of them.
    """
    place = place_in(data, split)
    folders = class_folders(place if is_folder(place) else data)
    if folders is not None and not is_folder(place):
        say_itself(data, split)
    records: Records = folders or open_split(data, split)
    labels = read_labels(records, label)
    public = PUBLIC_SETS.get(str(classes))
    names_of: Mapping[str, Sequence[str]]
    if public is None:
        names_of = read_classes(Path(classes)) if classes else {name: [name] for name in sorted({*labels})}
        return LabelledImages(records, names_of, find_labels(records, labels, names_of, str(classes or records.url)), 0)
    names_of = public.names_of(Path(records.url))
    rows = [i for i, its in enumerate(labels) if its in names_of or not public.has_others]
    if not rows:
        raise UserError(
            f"{records.url}: no image is of a class of {classes} (the first is of {labels[0]!r}); check `classes`"
        )
    chosen = RecordPart(records, rows, public.border)
    label_I = find_labels(chosen, [labels[i] for i in rows], names_of, str(classes))
    return LabelledImages(chosen, names_of, label_I, len(labels) - len(rows))


def class_folders(place: str) -> PictureFiles | None:
    """The pictures in a local folder that has no shards, whose label is the name of the folder that each is in; None if
    there are none. Raises UserError if the folders are those of splits."""
    folder = Path(place)
    if "://" in place or not folder.is_dir() or any(folder.glob("*.tar")):
        return None
    try:
        source = PictureFolder(folder)
    except UserError:
        return None
    paths = [PurePosixPath(name) for name in source.names]
    if splits := sorted(
        {path.parts[0] for path in paths if len(path.parts) > 2 and usual_split(path.parts[0]) in USUAL}
    ):
        raise UserError(f"{place}: folders for splits here ({', '.join(splits)}); name one with `split`")
    return PictureFiles(source, source.names, [{"label": path.parent.name} for path in paths])


def find_labels(records: Records, labels: Sequence[str], classes: Mapping[str, Any], source: str) -> Tensor:
    """The index of each record's label among the classes -> int64 [I]. Raises UserError for a label that is no class."""
    place = {label: c for c, label in enumerate(classes)}
    for i, label in enumerate(labels):
        if label not in place:
            near = get_close_matches(label, place, 3) or list(place)[:3]
            raise UserError(
                f"{source}: no class {label!r}, which {records.key(i)} of {records.url} has (near it: {', '.join(near)}); "
                f"add it, give a .json {{label: name}} as `classes`, or name another field of the records with `label`"
            )
    return torch.tensor([place[label] for label in labels])


@dataclass(frozen=True, eq=False)
class RecordPart:
    """Some of the records, their images without a border; see `Records`.

    Attributes:
        whole: all records.
        rows: which of them, by their number.
        border: pixels that are cut off at each edge.
    """

    whole: Records
    rows: Sequence[int]
    border: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def url(self) -> str:
        return self.whole.url

    @property
    def damage(self) -> Sequence[Dropped]:
        return self.whole.damage

    @property
    def fingerprint(self) -> str:
        part = f"{self.whole.fingerprint} {self.border} {[*self.rows]}"
        return hashlib.sha256(part.encode()).hexdigest()

    @property
    def folder(self) -> Path | None:
        return self.whole.folder

    def key(self, i: int) -> str:
        return self.whole.key(self.rows[i])

    def info(self, i: int) -> dict[str, Any]:
        return self.whole.info(self.rows[i])

    def images(self, i: int) -> tuple[bytes, ...]:
        images = self.whole.images(self.rows[i])
        return tuple(without_border(data, self.border, self.key(i)) for data in images) if self.border else images

    def image_count(self, i: int) -> int:
        return self.whole.image_count(self.rows[i])

    def detected(self, i: int) -> tuple[bytes, ...]:
        return self.whole.detected(self.rows[i])


def without_border(data: bytes, border: int, key: str) -> bytes:
    """An image without so many pixels at each edge, as PPM, which loses nothing. Raises RecordError, which names `key`, where
    it cannot be decoded or nothing is left."""
    try:
        pixels_HWC = read_pixels(data)[border:-border, border:-border]
    # Decoders given hostile bytes raise anything.
    except Exception as error:
        raise RecordError(key, f"cannot be decoded ({type(error).__name__}: {error})") from error
    height, width, _ = pixels_HWC.shape
    if not height or not width:
        raise RecordError(key, f"nothing is left of it after removing a border of {border} pixels")
    return b"P6 %d %d 255\n" % (width, height) + pixels_HWC.numpy().tobytes()
