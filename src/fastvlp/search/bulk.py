"""Shards to unit vectors of their images and captions, in files that a search engine, or numpy, can take.

A part is a file of so many records, written whole: `image` [n E], `text` [t E] and `image_of_text` [t] as safetensors, and
in its metadata the records, the texts and what was dropped. A run that was stopped goes on with the parts that lack.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fastvlp import dist
from fastvlp.batch import Dropped
from fastvlp.data.prefetch import Prefetch
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.errors import UserError
from fastvlp.exporters.native import short_place
from fastvlp.files import write_whole
from fastvlp.search.embedder import Embedder
from fastvlp.search.index import Scalar, Stamp, as_fields
from fastvlp.serve.options import Embed

PLAN, DROPPED = "embedded.json", "dropped.jsonl"


class Part(NamedTuple):
    """`places`: of the records in their shards. `infos`: captions, label and source of each. `image_of_text`: rows of
    `image`."""

    ids: list[str]
    places: list[int]
    infos: list[dict[str, Scalar]]
    image: np.ndarray
    said: list[str]
    text: np.ndarray
    image_of_text: np.ndarray
    dropped: list[Dropped]


class Read(NamedTuple):
    place: int
    key: str
    pixels: Tensor
    info: Mapping[str, Any]


class Embedded(NamedTuple):
    """What a folder of parts holds. `data`: the address of the shards."""

    folder: Path
    stamp: Stamp
    data: str
    parts: list[Path]


def embed(told: Embed) -> dict[str, Any] | None:
    """Writes the parts that lack, each rank its share; counts of the whole (None on all ranks but the main one).

    Raises UserError where the folder holds another model's or data set's parts."""
    if told.batch_size < 1 or told.per_part < 1:
        raise UserError(f"--batch-size {told.batch_size}, --per-part {told.per_part}: at least 1")
    if told.threads:
        torch.set_num_threads(told.threads)
    with dist.process_group():
        embedder = Embedder.load(told.export, told.device, told.precision)
        shards = Shards(told.data)
        fields = told.captions or (embedder.captions,)
        if dist.is_main():
            settle(told.out / PLAN, plan(told, embedder, shards, fields))
        dist.barrier()
        count = -(-len(shards) // told.per_part)
        missing = [n for n in range(dist.rank(), count, dist.world()) if not part_file(told.out, n).exists()]
        spans = [range(n * told.per_part, min(len(shards), (n + 1) * told.per_part)) for n in missing]
        for n, part in zip(missing, parts(embedder, shards, spans, fields, told.batch_size, show=dist.is_main())):
            write_whole(part_file(told.out, n), as_bytes(part))
        dist.barrier()
        return summary(told.out, shards) if dist.is_main() else None


def part_file(folder: Path, n: int) -> Path:
    return folder / f"{n:05d}.safetensors"


def plan(told: Embed, embedder: Embedder, shards: Shards, fields: Sequence[str]) -> dict[str, Any]:
    """What the parts of a folder have in common."""
    return {
        "stamp": as_fields(embedder.stamp),
        "data": shards.url if "://" in shards.url else str(Path(shards.url).resolve()),
        "records": len(shards),
        "keys": hashlib.sha256("\n".join(shards.keys).encode()).hexdigest(),
        "captions": list(fields),
        "precision": told.precision,
        "per_part": told.per_part,
    }


def settle(path: Path, wanted: Mapping[str, Any]) -> None:
    """Writes the plan, or finds that the folder has the same."""
    if not path.exists():
        if any(path.parent.glob("*.safetensors")):
            raise UserError(f"{path.parent}: holds safetensors that `vlp embed` did not write; choose another folder")
        write_whole(path, json.dumps(wanted, indent=2, ensure_ascii=False).encode())
        return
    found = _read_plan(path)
    # Shards may have been moved; their keys tell whether they are the same.
    changed = {name for name in wanted if found.get(name) != wanted[name]} - {"data"}
    if changed:
        told = "; ".join(f"{name}: {found.get(name)} then, {wanted[name]} now" for name in sorted(changed))
        raise UserError(
            f"{path.parent}: holds parts of another run ({told}); continue with the same, or choose another folder"
        )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: not a folder that `vlp embed` wrote, it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a folder that `vlp embed` wrote") from error
    return told if isinstance(told, dict) else {}


def parts(
    embedder: Embedder, shards: Shards, spans: Sequence[range], fields: Sequence[str], batch_size: int, show: bool
) -> Iterator[Part]:
    """A part for each span of records. What cannot be read is left out, by name; images are decoded ahead on all cores."""
    reader = RecordReader(shards, embedder.transform, max_pixels=embedder.max_pixels)

    def read(place: int) -> Read | Dropped:
        record = reader.record(place)
        try:
            return Read(place, record.key, record.images[0], record.info)
        except RecordError as error:
            return error.dropped

    def batches() -> Iterator[list[Read | Dropped]]:
        records = in_threads(read, chain.from_iterable(spans))
        stream = with_progress(records, lambda: sum(map(len, spans)), "embedded", show)
        for span in spans:
            for first in range(0, len(span), batch_size):
                yield list(islice(stream, min(batch_size, len(span) - first)))

    stream = Prefetch(batches())
    for span in spans:
        found: list[Read] = []
        vectors, dropped = [np.empty((0, embedder.width), np.float32)], []
        for batch in islice(stream, -(-len(span) // batch_size)):
            good = [one for one in batch if isinstance(one, Read)]
            dropped += [one for one in batch if isinstance(one, Dropped)]
            if good:
                vectors.append(embedder.images(torch.stack([one.pixels for one in good])))
            found += [one._replace(pixels=torch.empty(0)) for one in good]
        yield _part(embedder, shards, found, np.concatenate(vectors), fields, dropped)


def _part(
    embedder: Embedder,
    shards: Shards,
    found: Sequence[Read],
    image: np.ndarray,
    fields: Sequence[str],
    dropped: list[Dropped],
) -> Part:
    captions = [{field: usable_captions(one.info, field) for field in fields} for one in found]
    said = [[text for texts in its.values() for text in texts] for its in captions]
    flat = list(chain.from_iterable(said))
    once = {text: t for t, text in enumerate(dict.fromkeys(flat))}
    place = short_place(shards.url)
    infos = [{**_told(one.info, its), "source": f"{place}/{one.key}"} for one, its in zip(found, captions)]
    return Part(
        ids=[one.key for one in found],
        places=[one.place for one in found],
        infos=infos,
        image=image,
        said=flat,
        text=embedder.texts(list(once))[[once[text] for text in flat]],
        image_of_text=np.repeat(np.arange(len(found)), [len(texts) for texts in said]).astype(np.int64),
        dropped=dropped,
    )


def _told(info: Mapping[str, Any], captions: Mapping[str, Sequence[str]]) -> dict[str, Scalar]:
    """What is stored beside a vector: the first caption of each field (`caption`, of captions_zh `caption_zh`; of several
    joined by +, of each), and the label."""
    told: dict[str, Scalar] = {}
    for field in dict.fromkeys(name for fields in captions for name in fields.split("+")):
        told |= {field.replace("captions", "caption"): text for text in usable_captions(info, field)[:1]}
    label = info.get("label")
    return told | ({"label": label} if isinstance(label, str | int) and label != "" else {})


def as_bytes(part: Part) -> bytes:
    told = {
        "records": [{"id": i, "place": p, "info": info} for i, p, info in zip(part.ids, part.places, part.infos)],
        "texts": part.said,
        "dropped": [{"key": one.key, "reason": one.reason} for one in part.dropped],
    }
    tensors = {"image": part.image, "text": part.text, "image_of_text": part.image_of_text}
    # One entry: several would be in an order of their own each time.
    return save(tensors, metadata={"part": json.dumps(told, ensure_ascii=False)})


def read_part(path: Path) -> Part:
    """Raises UserError where the file is damaged."""
    try:
        with safe_open(path, "np") as file:
            told = json.loads(file.metadata()["part"])
            image, text, image_of_text = (file.get_tensor(name) for name in ("image", "text", "image_of_text"))
        records = told["records"]
        return Part(
            ids=[one["id"] for one in records],
            places=[one["place"] for one in records],
            infos=[one["info"] for one in records],
            image=image,
            said=told["texts"],
            text=text,
            image_of_text=image_of_text,
            dropped=[Dropped(**one) for one in told["dropped"]],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run `vlp embed` again") from error


def open_embedded(folder: Path) -> Embedded:
    """Raises UserError where a part lacks: the run was stopped."""
    told = _read_plan(folder / PLAN)
    try:
        count = -(-told["records"] // told["per_part"])
        found = Embedded(folder, Stamp(**told["stamp"]), told["data"], [part_file(folder, n) for n in range(count)])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / PLAN}: damaged ({error!r}); run `vlp embed` again, into another folder") from error
    if missing := [path.name for path in found.parts if not path.exists()]:
        raise UserError(
            f"{folder}: {len(missing)} of {count} parts are not there yet ({missing[0]} ...); run `vlp embed` again"
        )
    return found


def summary(folder: Path, shards: Shards) -> dict[str, Any]:
    """Counts, and dropped.jsonl with every record that is in no part."""
    images = texts = 0
    dropped = list(shards.damage)
    for path in open_embedded(folder).parts:
        part = read_part(path)
        images, texts = images + len(part.image), texts + len(part.text)
        dropped += part.dropped
    name_dropped(folder / DROPPED, dropped)
    return {"images": images, "texts": texts, "dropped": dropped}


def name_dropped(path: Path, dropped: Iterable[Dropped]) -> None:
    lines = [json.dumps({"key": one.key, "reason": one.reason}, ensure_ascii=False) + "\n" for one in dropped]
    write_whole(path, "".join(lines).encode())


def read_dropped(path: Path) -> list[Dropped]:
    """What `name_dropped` wrote. Raises UserError where it is not there: the run was stopped just before its end."""
    try:
        return [Dropped(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `vlp embed` again, which writes it") from error
