"""The commands that fill an index and ask it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fastvlp.batch import Dropped
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.errors import UserError
from fastvlp.search.bulk import DROPPED, Part, open_embedded, parts, read_dropped, read_part
from fastvlp.search.embedder import Embedder, Unreadable
from fastvlp.search.index import Hit, Index, Scalar, Stamp, middle, open_index, pictures_of
from fastvlp.search.pictures import Kept, thumbnail
from fastvlp.serve.options import Device, IndexBuild, IndexSearch

# Records that are embedded and added at a time.
SPAN = 1000


def build(told: IndexBuild) -> dict[str, Any]:
    """Adds, and says how many images the index has and what was dropped. Raises UserError for data that is not there."""
    pictures = pictures_of(told.index, told.pictures)
    if told.images == "keep" and pictures is None:
        raise UserError(f"{told.index}: say with --pictures in which folder its pictures are kept, or --images none")
    stamp, shards, found, dropped = _source(told)
    with closing(open_index(told.index, stamp, create=True)) as index:
        for part in found:
            dropped += part.dropped
            ids = [told.prefix + id for id in part.ids]
            new = changed(index, ids, part.image, part.infos)
            if pictures is not None:
                # Beside a new vector an old picture would be shown, and be read when results are re-ranked.
                for i in new:
                    pictures.delete(ids[i])
                if told.images == "keep" and shards is not None:
                    dropped += keep_pictures(pictures, shards, part, told.prefix)
            if new:
                index.add([ids[i] for i in new], part.image[new], [part.infos[i] for i in new])
        return {"images": index.count(), "dropped": dropped}


def _source(told: IndexBuild) -> tuple[Stamp, Shards | None, Iterator[Part], list[Dropped]]:
    """With the parts, what is dropped and named in none of them."""
    if (told.embedded is None) == (told.export is None) or (told.export is not None and told.data is None):
        raise UserError("give a folder that `vlp embed` wrote, or --export and --data: one of the two")
    if told.embedded is not None:
        embedded = open_embedded(told.embedded)
        shards = Shards(told.data or embedded.data) if told.images == "keep" else None
        paths = with_progress(embedded.parts, lambda: len(embedded.parts), "parts", show=True)
        # What the parts dropped is in the file too.
        found = (read_part(path)._replace(dropped=[]) for path in paths)
        return embedded.stamp, shards, found, read_dropped(embedded.folder / DROPPED)
    embedder, shards = _embedder(told, str(told.export)), Shards(str(told.data))
    spans = [range(first, min(first + SPAN, len(shards))) for first in range(0, len(shards), SPAN)]
    fields = told.captions or (embedder.captions,)
    read = parts(embedder, shards, spans, fields, told.batch_size, show=True)
    return embedder.stamp, shards, read, list(shards.damage)


def _embedder(told: Device, export: str) -> Embedder:
    if told.threads:
        torch.set_num_threads(told.threads)
    return Embedder.load(export, told.device, told.precision)


def keep_pictures(pictures: Kept, shards: Shards, part: Part, prefix: str = "") -> list[Dropped]:
    """Small pictures of the part's records that have none yet; what cannot be read now is named, and shown without one."""

    def keep(id: str, place: int) -> Dropped | None:
        if pictures.get(prefix + id) is not None:
            return None
        if place >= len(shards) or shards.key(place) != id:
            return Dropped(key=id, reason=f"no picture: {shards.url} has another record in its place")
        try:
            pictures.put(prefix + id, thumbnail(shards.read(place).images[0]))
        except (RecordError, OSError, ValueError) as error:
            return Dropped(key=id, reason=f"no picture: {error}")
        return None

    kept = in_threads(lambda pair: keep(*pair), zip(part.ids, part.places))
    return [one for one in kept if one is not None]


def changed(index: Index, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[dict[str, Scalar]]) -> list[int]:
    """Rows of what the index does not have just so: a build that was stopped goes on where it was."""
    known = {item.id: item for item in index.get(ids)}
    return [
        i
        for i, id in enumerate(ids)
        if id not in known or known[id].info != infos[i] or not np.array_equal(known[id].vector, vectors[i])
    ]


def search(told: IndexSearch) -> list[Hit]:
    """Raises UserError where nothing is asked, or the image cannot be read."""
    if told.text is None and told.image is None:
        raise UserError("nothing to search for: give --text, --image, or both")
    where = dict(map(_asked, told.where))
    embedder = _embedder(told, told.export)
    with closing(open_index(told.index, embedder.stamp)) as index:
        return index.search(query(embedder, told.text, told.image), told.k, where)[0]


def query(embedder: Embedder, text: str | None, image: Path | None) -> np.ndarray:
    """One unit row: of the text, of the image, or the middle between them."""
    rows = [] if text is None else [embedder.texts([text])[0]]
    try:
        rows += [] if image is None else [embedder.images([image.read_bytes()])[0]]
    except (OSError, Unreadable) as error:
        reason = error.reason if isinstance(error, Unreadable) else error.strerror
        raise UserError(f"{image}: cannot be read ({reason}); give a JPEG, PNG or WebP") from error
    return middle(rows)[None]


def _asked(term: str) -> tuple[str, list[Scalar]]:
    """FIELD=VALUE. On the command line a number looks like a text: either will do."""
    name, equals, value = term.partition("=")
    if not name or not equals:
        raise UserError(f"--where {term}: say FIELD=VALUE, such as label=cat")
    values: list[Scalar] = [value]
    for kind in (int, float):
        try:
            values.append(kind(value))
            break
        except ValueError:
            continue
    return name, values + ([value == "true"] if value in ("true", "false") else [])


def as_table(hits: Sequence[Hit]) -> Table:
    table = Table("score", "id", "caption", "source", show_edge=False)
    for hit in hits:
        table.add_row(f"{hit.score:.3f}", hit.id, str(hit.info.get("caption", "")), str(hit.info.get("source", "")))
    return table
