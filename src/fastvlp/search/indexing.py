"""Fills an index from shards or from embedded vectors, and searches it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from fastvlp.batch import Dropped
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.data.tokenize import Reading
from fastvlp.dist import PrecisionChoice
from fastvlp.errors import UserError
from fastvlp.search.addresses import shown
from fastvlp.search.bulk import embed_spans
from fastvlp.search.calibration import PairSample
from fastvlp.search.checks import Scalar, Where
from fastvlp.search.embedded import DROPPED, Part, open_embedded, read_dropped, read_part
from fastvlp.search.embedder import Embedder, Unreadable, mean_direction
from fastvlp.search.engines.interface import Hit, IndexEngine, Stamp, addresses, open_index, pictures_of
from fastvlp.search.pictures import PictureStore
from fastvlp.search.recall import measured_recall
from fastvlp.search.thumbnails import thumbnail

# Number of records that are embedded and added at a time.
SPAN = 1000
# Number of images, and of texts, with which recall is measured, and number of images whose fields are examined.
SAMPLE = 100


def parse_conditions(words: Sequence[str]) -> Where:
    """Parses words of the form FIELD=VALUE. On the command line a number looks like a text: an item may have either.

    Raises:
        UserError: A word has another form.
    """
    return dict(map(_parse_condition, words))


def _parse_condition(word: str) -> tuple[str, list[Scalar]]:
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise UserError(f"`where`: {word}: write FIELD=VALUE, such as label=cat")
    values: list[Scalar] = [value]
    for number in (int, float):
        try:
            values.append(number(value))
            break
        except ValueError:
            continue
    return name, values + ([value == "true"] if value in ("true", "false") else [])


# Parameters that are options of several commands.
IndexAddress = Annotated[str, arg(metavar="INDEX", help=f"Address of the index: {addresses()}.")]
Conditions = Annotated[
    Where | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[FIELD=VALUE ...]",
        instance_from_str=parse_conditions,
        is_instance=lambda value: value is None or isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{name}={wanted}" for name, wanted in (value or {}).items()],
    ),
]


class Hits(list[Hit]):
    """The hits of a search, best first. `notes`: warnings about the query: words that the model does not know, parts of a text
    that it does not read, and fields that no image has."""

    def __init__(self, hits: Iterable[Hit] = (), notes: Iterable[str] = ()):
        super().__init__(hits)
        self.notes = list(notes)


class Built(NamedTuple):
    """The result of a build. `uri`: address of the index. `images`: number of images in the whole index. `dropped`: records
    that could not be read, or whose picture could not be stored. `recall`: the share of the ten nearest images of this build
    that a search finds, measured with a sample of its images and texts; None if there are none."""

    uri: str
    images: int
    dropped: list[Dropped]
    recall: float | None


class _Source(NamedTuple):
    """The vectors that an index is built from. `shards`: the shards to read pictures from; None if no pictures are stored.
    `dropped`: dropped records that the parts themselves do not list."""

    stamp: Stamp
    shards: Shards | None
    parts: Iterator[Part]
    dropped: list[Dropped]


def build_index(
    index: IndexAddress,
    embedded: Annotated[str | Path | None, arg(metavar="[EMBEDDED]")] = None,
    /,
    *,
    export: str | Path | None = None,
    data: str | Path | None = None,
    captions: Sequence[str] | None = None,
    batch_size: int = 256,
    images: Literal["keep", "none"] = "keep",
    pictures: str | Path | None = None,
    prefix: str = "",
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    threads: int | None = None,
) -> Built:
    """Add the images of shards to an index. If there is no index yet, it is made.

    Give either a folder that `vlp embed` wrote, or a model (export) and the shards (data). Items that the index already has are
    replaced, so an interrupted command can be started again.

    Args:
        index: Address of the index.
        embedded: Folder that `vlp embed` wrote.
        export: Model that embeds `data`, if there is no embedded folder.
        data: Folder of shards. With an embedded folder it is only needed if the shards were moved.
        captions: Fields of the records with the captions, such as captions captions_zh; by default the field that the model
            was trained on.
        batch_size: Number of pictures in one pass through the model.
        images: keep stores pictures of at most 320 pixels for the search page; none stores no pictures.
        pictures: Folder for these pictures; by default `pictures` in the index's folder. An index on a server needs one.
        prefix: Text that is put before the records' keys to make ids, so that several data sets fit into one index.
        device: auto, cpu, cuda or cuda:N.
        precision: Precision of the computation: fp32, bf16, or auto, which is bf16 if the model was trained in bf16 and the
            device computes bf16 fast. Vectors are stored in fp32.
        threads: CPU threads that PyTorch uses; by default one for each core.

    Raises:
        UserError: The data are missing, the index belongs to another model, or it cannot be written.
    """
    store = pictures_of(index, pictures)
    if images == "keep" and store is None:
        raise UserError(f"{shown(index)}: has no folder for pictures; give `pictures`, or set `images` to none")
    if (embedded is None) == (export is None) or (export is not None and data is None):
        raise UserError("give either a folder that `vlp embed` wrote, or both `export` and `data`")
    if embedded is not None:
        source = _embedded_source(Path(embedded), data, read_shards=images == "keep")
    else:
        embedder = Embedder.load(str(export), device, precision, threads)
        source = _embedding_source(embedder, str(data), captions or [embedder.captions], batch_size)
        source = source if images == "keep" else source._replace(shards=None)
    with closing(open_index(index, source.stamp, create=True)) as engine:
        dropped, ids, queries = list(source.dropped), list[str](), _Sample(source.stamp.width)
        for part in source.parts:
            dropped += _add_part(engine, store, source.shards, part, prefix)
            ids += [prefix + id for id in part.ids]
            queries.add(part)
        if (calibration := queries.pairs.calibrated()) is not None:
            engine.calibrate(calibration)
        return Built(shown(index), engine.count(), dropped, measured_recall(engine, ids, queries.vectors()))


class _Sample:
    """A sample of vectors of images, of texts, and of pairs. All vectors of all parts have the same chance."""

    def __init__(self, width: int):
        self.pairs = PairSample(width)
        self._draw = np.random.default_rng(0)
        self._kinds = {kind: (np.empty(0), np.empty((0, width), np.float32)) for kind in ("image", "text")}

    def add(self, part: Part) -> None:
        self.pairs.add(part.image[part.image_of_text], part.text)
        for kind, rows in (("image", part.image), ("text", part.text)):
            # The vectors with the smallest random numbers are kept.
            numbers, kept = self._kinds[kind]
            numbers = np.concatenate([numbers, self._draw.random(len(rows))])
            chosen = np.argsort(numbers)[:SAMPLE]
            self._kinds[kind] = numbers[chosen], np.concatenate([kept, rows])[chosen]

    def vectors(self) -> np.ndarray:
        return np.concatenate([kept for _, kept in self._kinds.values()])


def _add_part(
    index: IndexEngine, store: PictureStore | None, shards: Shards | None, part: Part, prefix: str
) -> list[Dropped]:
    """Adds the items of a part that the index lacks, and their pictures if there are shards to read them from. Returns the
    records that could not be read."""
    dropped = list(part.dropped)
    ids = [prefix + id for id in part.ids]
    new = changed_rows(index, ids, part.image, part.infos)
    if store is not None:
        # An old picture beside a new vector would be shown in results and used for re-ranking.
        for row in new:
            store.delete(ids[row])
        if shards is not None:
            dropped += store_pictures(store, shards, part, prefix)
    if new:
        index.add([ids[row] for row in new], part.image[new], [part.infos[row] for row in new])
    return dropped


def _embedded_source(folder: Path, data: str | Path | None, read_shards: bool) -> _Source:
    embedded = open_embedded(folder)
    shards = Shards(data or embedded.data) if read_shards else None
    paths = with_progress(embedded.parts, lambda: len(embedded.parts), "parts", show=True)
    # The file of dropped records also lists those of the parts, so they are not listed twice.
    parts = (read_part(path)._replace(dropped=[]) for path in paths)
    return _Source(embedded.stamp, shards, parts, read_dropped(embedded.folder / DROPPED))


def _embedding_source(embedder: Embedder, data: str, fields: Sequence[str], batch_size: int) -> _Source:
    shards = Shards(data)
    spans = [range(first, min(first + SPAN, len(shards))) for first in range(0, len(shards), SPAN)]
    parts = embed_spans(embedder, shards, spans, fields, batch_size, show=True)
    return _Source(embedder.stamp, shards, parts, list(shards.damage))


def store_pictures(store: PictureStore, shards: Shards, part: Part, prefix: str = "") -> list[Dropped]:
    """Stores small pictures of a part's records that have none yet. Returns the records whose picture could not be read."""

    def keep(id: str, position: int) -> Dropped | None:
        if store.get(prefix + id) is not None:
            return None
        if position >= len(shards) or shards.key(position) != id:
            return Dropped(key=id, reason=f"no picture: {shards.url} has another record in its place")
        try:
            store.put(prefix + id, thumbnail(shards.read(position).images[0]))
        except (RecordError, OSError, ValueError) as error:
            return Dropped(key=id, reason=f"no picture: {error}")
        return None

    results = in_threads(lambda pair: keep(*pair), zip(part.ids, part.positions))
    return [dropped for dropped in results if dropped is not None]


def changed_rows(
    index: IndexEngine, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[dict[str, Scalar]]
) -> list[int]:
    """Returns the rows of items that the index lacks, or has with another vector or other fields, so that a build that was
    stopped continues where it was."""
    present = {item.id: item for item in index.get(ids)}
    return [
        row
        for row, id in enumerate(ids)
        if id not in present or present[id].info != infos[row] or not np.array_equal(present[id].vector, vectors[row])
    ]


def search_index(
    index: IndexAddress,
    /,
    *,
    export: str | Path,
    text: str | None = None,
    image: str | Path | None = None,
    where: Conditions = None,
    k: int = 10,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    threads: int | None = None,
) -> Hits:
    """Search an index for images by a text, by an image, or by both at once.

    Args:
        index: Address of the index.
        export: Folder of the model that the index was built with.
        text: Text that describes the images.
        image: File of an image that is similar to the images.
        where: Values of fields that the images must have, such as label=cat.
        k: Number of images to return.
        device: auto, cpu, cuda or cuda:N.
        precision: Precision of the computation: fp32, bf16, or auto, which is bf16 if the model was trained in bf16 and the
            device computes bf16 fast.
        threads: CPU threads that PyTorch uses; by default one for each core.

    Returns:
        The most similar images, best first. Its `notes` list the unknown words and fields of the query.

    Raises:
        UserError: Neither a text nor an image is given, the image cannot be read, or the index belongs to another model.
    """
    if text is None and image is None:
        raise UserError("nothing to search for: give `text`, `image`, or both")
    embedder = Embedder.load(export, device, precision, threads)
    with closing(open_index(index, embedder.stamp)) as engine:
        query = query_vector(embedder, text, image)
        hits = engine.search(query, k, where)[0]
        notes = [] if text is None else text_notes(embedder.readings(text)[0])
        return Hits(hits, notes if hits or not where else notes + field_notes(engine, query, where))


def text_notes(reading: Reading) -> list[str]:
    """Returns notes on the parts of a text that the model does not read."""
    notes = []
    if reading.unknown:
        notes.append(f"words that the model does not know: {', '.join(reading.unknown)}")
    if reading.cut:
        notes.append(f"the text is longer than the model reads; not read: {reading.cut}")
    return notes


def field_notes(engine: IndexEngine, query: np.ndarray, where: Where) -> list[str]:
    """For a filter that no image matches: returns a note on those of its fields that none of the nearest images has."""
    near = engine.search(query, SAMPLE)[0]
    known = sorted({name for hit in near for name in hit.info})
    unknown = [name for name in where if name not in known]
    if not near or not unknown:
        return []
    fields = f"their fields are {', '.join(known)}" if known else "they have no fields"
    return [f"none of the {len(near)} nearest images has {' or '.join(unknown)}; {fields}"]


def query_vector(embedder: Embedder, text: str | None, image: str | Path | None) -> np.ndarray:
    """Returns one unit row [1 E]: the vector of the text or of the image, or their mean direction if both are given."""
    rows = [] if text is None else [embedder.texts([text])[0]]
    try:
        rows += [] if image is None else [embedder.images([Path(image).read_bytes()])[0]]
    except (OSError, Unreadable) as error:
        reason = error.reason if isinstance(error, Unreadable) else error.strerror
        raise UserError(f"{image}: cannot be read ({reason}); give a JPEG, PNG or WebP") from error
    return mean_direction(rows)[None]


def hits_table(hits: Sequence[Hit]) -> Table:
    """Lays out hits for a terminal."""
    table = Table(show_edge=False)
    for name in ("score", "id"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for name in ("caption", "source"):
        # This column becomes narrower so that the others fit; its texts are cut and not wrapped.
        table.add_column(name)
    for hit in hits:
        fields = (" ".join(str(hit.info.get(name, "")).split()) for name in ("caption", "source"))
        cut = (Text(text, no_wrap=True, overflow="ellipsis") for text in fields)
        # Printed literally, not as rich's markup.
        table.add_row(f"{hit.score:.4f}", Text(hit.id), *cut)
    return table
