"""Reads records for a model: images decoded to the model's square, with their regions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from fastvlp.batch import Dropped, Record
from fastvlp.data.image_cache import ImageCache, room_for_images
from fastvlp.data.records.decode import MAX_PIXELS, StoredShape, decoded_with_shapes, stored_shape
from fastvlp.data.records.interface import Records
from fastvlp.data.records.shards import RecordError
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import ImageRegions, RegionSource, read_regions, visible_boxes
from fastvlp.data.states_file import StatesFile
from fastvlp.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class RecordReader:
    """Opens the records of one split.

    Args:
        shards: the records.
        transform: converts an image to the model's square.
        images: the images of a record that are used: the `first` one, `all`, or exactly this number, where a record with
            another number of images is an error.
        regions: regions that are loaded with each image; None: no regions.
        cache: keep the decoded images in memory, 3 * size**2 bytes each, as many as there is room for. Not for `all`, whose
            number is not known.
        states: stored states of these images, which are read instead of their pixels.
        max_pixels: an image with more pixels is an error, which is found in its header.
        strict: raise UserError if a record cannot be used (evaluation), instead of dropping and naming it (training).

    Raises UserError if `strict` is set and the shards are damaged. Picklable; a pickled copy has an empty cache.
    """

    def __init__(
        self,
        shards: Records,
        transform: Transform,
        *,
        images: int | Literal["first", "all"] = "first",
        regions: RegionSource | None = None,
        cache: bool = False,
        states: StatesFile | None = None,
        max_pixels: int = MAX_PIXELS,
        strict: bool = False,
    ):
        if strict and shards.damage:
            raise refusal(shards, list(shards.damage))
        self.shards = shards
        self.transform = transform
        self.images = images
        self.regions = regions
        self.max_pixels = max_pixels
        self.strict = strict
        self.states = states
        self.cache: ImageCache | StatesFile | None = states
        if cache and states is None:
            if images == "all":
                raise ValueError("a cache needs a fixed number of images for each record")
            self.cache = room_for_images(shards.url, len(shards) * (1 if images == "first" else images), transform.size)

    def record(self, i: int) -> RecordView:
        """Returns record i of the shards, of which nothing is read yet."""
        return RecordView(self, i)

    def read_each(self, read: Callable[[T], R], items: Iterable[T]) -> tuple[list[R], list[Dropped]]:
        """Calls `read` for every item. Returns the results, and the names of the records for which `read` raised RecordError.
        If the reader is strict, raises UserError with these names."""
        results: list[R] = []
        dropped: list[Dropped] = []
        for item in items:
            try:
                results.append(read(item))
            except RecordError as error:
                dropped.append(error.dropped)
        if dropped and self.strict:
            raise refusal(self.shards, dropped)
        return results, dropped


class _Once(Generic[T]):
    """A `functools.cached_property` without the lock that it has in Python 3.11, in which a batch from memory spent 7 % of its
    time."""

    def __init__(self, compute: Callable[[Any], T]):
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, view: Any, owner: type | None = None) -> T:
        value = self._compute(view)
        view.__dict__[self._name] = value
        return value


class RecordView:
    """One record. Each part is read when it is first used. Raises RecordError if a part cannot be read."""

    def __init__(self, reader: RecordReader, i: int):
        self._reader = reader
        self._i = i

    @property
    def key(self) -> str:
        return self._reader.shards.key(self._i)

    @_Once
    def info(self) -> Mapping[str, Any]:
        """The record's JSON."""
        return self._reader.shards.info(self._i)

    @_Once
    def encoded(self) -> tuple[bytes, ...]:
        """The encoded images of the record."""
        return self._reader.shards.images(self._i)

    @_Once
    def detected(self) -> tuple[bytes, ...]:
        """The npz files with a detector's regions, one for each image; empty if none were imported."""
        return self._reader.shards.detected(self._i)

    @_Once
    def images(self) -> list[Tensor]:
        """The images that are used, uint8 [3 size size] each; or their stored states, [S D] each."""
        reader, cache = self._reader, self._reader.cache
        if isinstance(reader.images, int) and (count := reader.shards.image_count(self._i)) != reader.images:
            raise RecordError(self.key, f"has {count} images, {reader.images} needed")
        if cache is not None and self._is_cached:
            return [cache.image(place) for place in self._places]
        record = Record(key=self.key, images=self.encoded, info=self.info)
        decoded = decoded_with_shapes(record, reader.transform, max_pixels=reader.max_pixels)
        images, shapes = (list(part) for part in zip(*(decoded[:1] if reader.images == "first" else decoded)))
        self.__dict__["shapes"] = shapes
        if reader.states is not None:
            raise RecordError(record.key, f"could not be read when {reader.states.path} was made; delete that file")
        if isinstance(cache, ImageCache):
            for place, image, shape in zip(self._places, images, shapes):
                cache.put(place, image, shape)
        return images

    @_Once
    def shapes(self) -> list[StoredShape]:
        """The stored shape of each used image, to which the record's boxes refer."""
        if self._reader.cache is not None and self._is_cached:
            return [self._reader.cache.shape(place) for place in self._places]
        used = self.encoded[:1] if self._reader.images == "first" else self.encoded
        return [stored_shape(data) for data in used]

    @_Once
    def regions(self) -> list[ImageRegions]:
        """The regions of each used image; empty if the reader reads no regions."""
        source = self._reader.regions
        if source is None:
            return []
        detected = self.detected if source.stored else ()
        return [
            read_regions(source, self.key, self.info, shape, self._reader.transform, detected, image=k)
            for k, shape in enumerate(self.shapes)
        ]

    def visible_boxes(self, box_R4: Tensor, image: int = 0) -> Tensor:
        """Converts boxes x0 y0 x1 y1 in pixels of a stored image to fractions of the image that the model sees. Boxes that it
        does not see get no area."""
        return visible_boxes(box_R4, self.shapes[image], self._reader.transform)

    @property
    def _places(self) -> range:
        """Indices of the used images in the cache."""
        n = self._reader.images if isinstance(self._reader.images, int) else 1
        return range(self._i * n, (self._i + 1) * n)

    @property
    def _is_cached(self) -> bool:
        cache = self._reader.cache
        return cache is not None and all(map(cache.__contains__, self._places))


def refusal(shards: Records, dropped: list[Dropped]) -> UserError:
    """Returns the error for records that cannot be used in an evaluation, which leaves no record out."""
    names = "; ".join(f"{d.key}: {d.reason}" for d in dropped[:8])
    return UserError(
        f"{shards.url}: {len(dropped)} records cannot be used ({names}), and an evaluation leaves none out; "
        f"mend or remove them (`vlp data inspect` lists all)"
    )
