"""Shards to unit vectors of their images and captions. A run that was stopped goes on with the parts that are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tyro.conf import arg

from fastvlp import dist
from fastvlp.batch import Dropped
from fastvlp.data.prefetch import Prefetch
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.dist import PrecisionChoice
from fastvlp.errors import UserError
from fastvlp.files import write_whole
from fastvlp.provenance import data_name
from fastvlp.search.checks import Scalar
from fastvlp.search.embedded import (
    DROPPED,
    PLAN,
    Part,
    open_embedded,
    part_bytes,
    part_file,
    read_part,
    write_dropped,
    write_plan,
)
from fastvlp.search.embedder import Embedder


class Counts(NamedTuple):
    """The numbers of vectors in a folder, and of the records that it lacks."""

    folder: Path
    images: int
    texts: int
    dropped: list[Dropped]


class _Readable(NamedTuple):
    """A record whose picture could be read. `position`: in the shards."""

    position: int
    key: str
    pixels: Tensor
    info: Mapping[str, Any]


def embed_shards(
    export: Annotated[str | Path, arg(metavar="EXPORT")],
    data: Annotated[str | Path, arg(metavar="DATA")],
    out: Annotated[str | Path, arg(metavar="OUT")],
    /,
    *,
    captions: Sequence[str] | None = None,
    batch_size: int = 256,
    per_part: int = 1000,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    threads: int | None = None,
) -> Counts | None:
    """Compute unit vectors of the images and captions in shards, and write them to files.

    Under `torchrun` the ranks share the work. If the command was interrupted, it continues when it is started again, with any
    number of ranks.

    Args:
        export: Folder that `vlp export` wrote.
        data: Folder of shards.
        out: Folder to write. It gets the vectors as safetensors, with ids and captions beside them, and dropped.jsonl, which
            lists the records that could not be read.
        captions: Fields of the records with the captions, such as captions captions_zh; by default the field that the model
            was trained on.
        batch_size: Number of pictures in one pass through the model.
        per_part: Number of records in a file.
        device: auto, cpu, cuda or cuda:N.
        precision: Precision of the computation: fp32, bf16, or auto, which is bf16 if the model was trained in bf16 and the
            device computes bf16 fast. Vectors are stored in fp32.
        threads: CPU threads that PyTorch uses; by default one for each core.

    Returns:
        The numbers of vectors in the folder; None on all ranks except the main rank.

    Raises:
        UserError: The folder has vectors of another model or of other data.
    """
    if batch_size < 1 or per_part < 1:
        raise UserError(f"`batch_size` {batch_size} and `per_part` {per_part} must be at least 1")
    out = Path(out)
    with dist.process_group():
        embedder = Embedder.load(export, device, precision, threads)
        shards = Shards(data)
        fields = list(captions or [embedder.captions])
        if dist.is_main():
            write_plan(out / PLAN, _plan(embedder, shards, fields, per_part))
        dist.barrier()
        count = -(-len(shards) // per_part)
        missing = [n for n in range(count) if not part_file(out, n).exists()]
        # All ranks have looked before one writes: they divide the same list, whoever wrote the parts that are there.
        dist.barrier()
        missing = missing[dist.rank() :: dist.world()]
        spans = [range(n * per_part, min(len(shards), (n + 1) * per_part)) for n in missing]
        for n, part in zip(missing, embed_spans(embedder, shards, spans, fields, batch_size, show=dist.is_main())):
            write_whole(part_file(out, n), part_bytes(part))
        dist.barrier()
        return _summary(out, shards) if dist.is_main() else None


def _plan(embedder: Embedder, shards: Shards, fields: Sequence[str], per_part: int) -> dict[str, Any]:
    """Says what the parts of a folder have in common."""
    return {
        "stamp": asdict(embedder.stamp),
        "data": shards.url if "://" in shards.url else str(Path(shards.url).resolve()),
        "records": len(shards),
        "keys": hashlib.sha256("\n".join(shards.keys).encode()).hexdigest(),
        "captions": list(fields),
        "precision": embedder.precision,
        "per_part": per_part,
    }


def _summary(folder: Path, shards: Shards) -> Counts:
    """Counts, and writes dropped.jsonl with every record that is in no part."""
    images = texts = 0
    dropped = list(shards.damage)
    for path in open_embedded(folder).parts:
        part = read_part(path)
        images, texts = images + len(part.image), texts + len(part.text)
        dropped += part.dropped
    write_dropped(folder / DROPPED, dropped)
    return Counts(folder, images, texts, dropped)


def embed_spans(
    embedder: Embedder, shards: Shards, spans: Sequence[range], fields: Sequence[str], batch_size: int, show: bool
) -> Iterator[Part]:
    """Yields a part for each span of records, with what could not be read named in it. Images are decoded ahead on all cores.

    Args:
        embedder: The model.
        shards: The records.
        spans: Positions of records in the shards.
        fields: Of the records, with their captions.
        batch_size: Pictures of one pass through the model.
        show: Whether a bar is shown on a terminal.
    """

    reader = RecordReader(shards, embedder.transform, max_pixels=embedder.max_pixels)

    def read(position: int) -> _Readable | Dropped:
        record = reader.record(position)
        try:
            return _Readable(position, record.key, record.images[0], record.info)
        except RecordError as error:
            return error.dropped

    def batches() -> Iterator[list[_Readable | Dropped]]:
        records = in_threads(read, chain.from_iterable(spans))
        stream = with_progress(records, lambda: sum(map(len, spans)), "embedded", show)
        for span in spans:
            for first in range(0, len(span), batch_size):
                yield list(islice(stream, min(batch_size, len(span) - first)))

    stream = Prefetch(batches())
    for span in spans:
        records: list[_Readable] = []
        vectors, dropped = [np.empty((0, embedder.width), np.float32)], []
        for batch in islice(stream, -(-len(span) // batch_size)):
            readable = [record for record in batch if isinstance(record, _Readable)]
            dropped += [record for record in batch if isinstance(record, Dropped)]
            if readable:
                vectors.append(embedder.images(torch.stack([record.pixels for record in readable])))
            # The pixels are not needed any more.
            records += [record._replace(pixels=torch.empty(0)) for record in readable]
        yield _part(embedder, shards, records, np.concatenate(vectors), fields, dropped)


def _part(
    embedder: Embedder,
    shards: Shards,
    records: Sequence[_Readable],
    image: np.ndarray,
    fields: Sequence[str],
    dropped: list[Dropped],
) -> Part:
    texts = [
        [text for field in dict.fromkeys(fields) for text in usable_captions(record.info, field)] for record in records
    ]
    captions = list(chain.from_iterable(texts))
    # A text that several records have is embedded once.
    row_of = {text: row for row, text in enumerate(dict.fromkeys(captions))}
    source = data_name(shards.url)
    return Part(
        ids=[record.key for record in records],
        positions=[record.position for record in records],
        infos=[{**_stored_fields(record.info, fields), "source": f"{source}/{record.key}"} for record in records],
        image=image,
        captions=captions,
        text=embedder.texts(list(row_of))[[row_of[text] for text in captions]],
        image_of_text=np.repeat(np.arange(len(records)), list(map(len, texts))).astype(np.int64),
        dropped=dropped,
    )


def _stored_fields(info: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Scalar]:
    """Returns what is stored beside a vector: the first caption of each field (`caption`; `caption_zh` of captions_zh; of
    several fields joined by + that of each), and the label."""
    stored: dict[str, Scalar] = {}
    for field in dict.fromkeys(name for joined in fields for name in joined.split("+")):
        stored |= {field.replace("captions", "caption"): text for text in usable_captions(info, field)[:1]}
    label = info.get("label")
    return stored | ({"label": label} if isinstance(label, str | int) and label != "" else {})
