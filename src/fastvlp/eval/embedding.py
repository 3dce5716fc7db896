"""Embeddings of whole splits: every image is decoded and encoded once, every text once however often it is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from fastvlp.batch import Dropped, Regions
from fastvlp.data.pairs import Fit
from fastvlp.data.prefetch import Prefetch
from fastvlp.data.reader import RecordReader, refusal
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import ImageRegions, RegionSource, pad_regions
from fastvlp.data.splits import is_folder, place_in
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.data.tokenize import Tokenizer
from fastvlp.dist import pick_device
from fastvlp.errors import UserError
from fastvlp.eval.mode import evaluating
from fastvlp.eval.options import Encode, Masked
from fastvlp.model.joint_space import unit
from fastvlp.model.model import VLModel
from fastvlp.model.saved_run import SavedData, read_saved_run
from fastvlp.model.saving import Saved, load_model
from fastvlp.random import hash64_rows, uniform

VIEW_SALT = 701
Features = Literal["pooled", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model with what it reads images and texts by. regions: where boxes come from, of models that read them. `keep`,
    `views`: see `view_keeps`. show: bars on a terminal."""

    model: VLModel
    tokenizer: Tokenizer
    batch_size: int = 256
    max_length: int = 50
    fit: Fit = "crop"
    regions: RegionSource | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    keep: float = 1.0
    views: int = 1
    show: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def reading(self) -> Iterator[None]:
        """No gradients, and the number type of training."""
        bf16 = self.precision == "bf16"
        with evaluating(self.model), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            yield


class Images(NamedTuple):
    """uint8 [B 3 H W], and the regions of a model that reads boxes."""

    image: Tensor
    regions: Regions | None

    def to(self, device: torch.device) -> Images:
        return _pytree.tree_map_only(Tensor, lambda x: x.to(device), self)


class Embedded(NamedTuple):
    """Unit vectors of a split's images and of all their captions, on the model's device."""

    image_IE: Tensor
    text_TE: Tensor
    image_of_text_T: Tensor


def open_run(told: Encode, folder: str | None = None) -> tuple[Reader, Saved, SavedData]:
    """The run's model, ready to read as it was trained to but for what is told, and what its config says of its data."""
    if told.batch_size < 1 or (told.max_length is not None and told.max_length < 2):
        raise UserError(f"--batch-size {told.batch_size}, --max-length {told.max_length}: at least 1, and 2")
    if told.threads:
        torch.set_num_threads(told.threads)
    saved = load_model(folder or told.run)
    trained = read_saved_run(folder or told.run)
    data = trained.data
    reader = Reader(
        model=saved.model.to(pick_device(told.device)),
        tokenizer=saved.tokenizer,
        batch_size=told.batch_size,
        max_length=min(told.max_length or data.max_length, saved.model.config.longest_text),
        fit=told.fit or data.fit,
        regions=data.regions,
        precision=told.precision or trained.precision,
        keep=getattr(told, "keep", 1.0),
        views=getattr(told, "views", 1),
        show=True,
    )
    return reader, saved, data


def open_towers(told: Masked) -> tuple[Reader, Saved, SavedData]:
    """As `open_run`. Raises UserError where the model cannot embed."""
    opened = open_run(told)
    if opened[0].model.config.embed is None:
        raise UserError(
            f"{told.run}: it has no towers that embed images and texts, so that it cannot do {type(told).__name__.lower()} "
            f"alone; give a run that was trained with model.embed"
        )
    return opened


def open_split(told: Encode) -> Shards:
    place = place_in(told.data, told.split)
    if is_folder(place):
        return Shards(place)
    try:
        return Shards(told.data)
    except UserError as error:
        raise UserError(f"--split {told.split}: no folder of that name in the data; {error}") from error


def image_batches(shards: Shards, reader: Reader, description: str = "images") -> Iterator[tuple[slice, Images]]:
    """Every record's first image in order, decoded on all cores ahead of their use. Raises UserError for one that cannot
    be read: an evaluation leaves none out."""
    config = reader.model.config
    transform = Transform(size=config.image.size, mode=reader.fit)
    source = reader.regions if config.embed is not None and config.embed.reads_boxes else None
    records = RecordReader(shards, transform, regions=source, strict=True)

    def read(i: int) -> tuple[Tensor, list[ImageRegions]] | Dropped:
        record = records.record(i)
        try:
            return record.images[0], record.regions
        except RecordError as error:
            return error.dropped

    def batches() -> Iterator[tuple[slice, Images]]:
        read_all = in_threads(read, range(len(shards)))
        images = with_progress(read_all, lambda: len(shards), description, reader.show)
        for first in range(0, len(shards), reader.batch_size):
            part = list(islice(images, reader.batch_size))
            if dropped := [one for one in part if isinstance(one, Dropped)]:
                raise refusal(shards, dropped)
            seen, found = zip(*(one for one in part if not isinstance(one, Dropped)))
            regions = None if source is None else pad_regions([regions for image in found for regions in image])
            yield slice(first, first + len(part)), Images(torch.stack(seen), regions)

    return Prefetch(batches())


def view_edges(patches: int, keep: float, views: int) -> list[int]:
    """Where a row of patches is cut into views. Raises UserError where they cannot be of different patches."""
    edges = [round(patches * keep * v) for v in range(views + 1)]
    if not 0 < keep <= 1 or views < 1 or edges[-1] > patches or 0 in [b - a for a, b in pairwise(edges)]:
        raise UserError(
            f"--keep {keep:g} --views {views}: of {patches} patches each view shows a share, above 0, of its own, "
            f"so that views times keep is at most 1; FLIP has 2 at 0.5 and 4 at 0.25"
        )
    return edges


def view_keeps(seed_B: Tensor, patches: int, keep: float, views: int) -> list[Tensor]:
    """Sorted indices [B K] of each view's patches: one permutation a row, a function of its seed, cut into `views` parts
    that share no patch. With keep * views = 1 they cover the image."""
    order_BN = uniform(seed_B, (patches,), VIEW_SALT).argsort(1)
    edges = view_edges(patches, keep, views)
    return [order_BN[:, a:b].sort(1).values for a, b in pairwise(edges)]


def embed_views(model: VLModel, images: Images, seed_B: Tensor, keep: float, views: int) -> Tensor:
    """Unit vectors [B E] of whole images or, for keep < 1, of masked views: the mean of theirs, made a unit vector again.
    FLIP (arXiv 2212.00794, table 1d) does not say how views are combined; the mean is ours."""
    if keep == views == 1:
        return model.embed_image(model.encode_image(images.image), images.regions)
    model.config.image.check_can_drop()
    keeps = view_keeps(seed_B, model.config.image.grid**2, keep, views)
    found = [model.embed_image(model.encode_image(images.image, kept), images.regions) for kept in keeps]
    return unit(torch.stack(found).mean(0))


def image_features(model: VLModel, images: Images, kind: Features = "pooled") -> Tensor:
    """What a linear probe reads of images, fp32 [B D]: the embedding, or what its projection reads. A model without an
    embedding head gives the mean of its image states."""
    state_BKD = model.encode_image(images.image)
    if kind == "embedding":
        return model.embed_image(state_BKD, images.regions)
    if model.config.embed is None:
        return state_BKD.mean(1).float()
    return model.embed.image.summary(state_BKD, regions=images.regions).float()


def embed_images(reader: Reader, shards: Shards) -> Tensor:
    """Every record's first image -> unit vectors [I E]."""
    parts = []
    with reader.reading():
        for rows, images in image_batches(shards, reader):
            seed_B = hash64_rows(0, torch.arange(rows.start, rows.stop)).to(reader.device)
            parts.append(embed_views(reader.model, images.to(reader.device), seed_B, reader.keep, reader.views))
    return torch.cat(parts)


def embed_texts(reader: Reader, texts: Sequence[str]) -> Tensor:
    """Unit vectors [T E] in the texts' order. Equal texts are embedded once, so that their vectors are equal; those of
    like length share a batch, so that little is padded."""
    once = sorted(dict.fromkeys(texts), key=len)
    parts = [once[first : first + reader.batch_size] for first in range(0, len(once), reader.batch_size)]
    found = []
    with reader.reading():
        for part in with_progress(parts, lambda: len(parts), "batches of texts", reader.show):
            ids_BL, length_B = reader.tokenizer.encode(part, reader.max_length)
            found.append(reader.model.embed_text(ids_BL.to(reader.device), length_B.to(reader.device)))
    place = {text: t for t, text in enumerate(once)}
    return torch.cat(found)[torch.tensor([place[text] for text in texts], device=reader.device)]


def embed_split(reader: Reader, shards: Shards, captions: Sequence[Sequence[str]]) -> Embedded:
    """`captions`: those of each record."""
    image_of_text = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(its) for its in captions]))
    image_IE = embed_images(reader, shards)
    return Embedded(
        image_IE, embed_texts(reader, [text for its in captions for text in its]), image_of_text.to(reader.device)
    )


def read_captions(shards: Shards, field: str) -> list[list[str]]:
    """All captions of each record. Raises UserError where one has none."""
    found = [usable_captions(info, field) for info in _infos(shards)]
    without = [shards.key(i) for i, captions in enumerate(found) if not captions]
    if without:
        raise UserError(
            f"{shards.url}: {len(without)} records have no caption in {field!r} ({', '.join(without[:3])}), and an "
            f"evaluation leaves none out; remove them, or name another field with --captions"
        )
    return found


def read_labels(shards: Shards, field: str) -> list[str]:
    """The class of each record. Raises UserError where one has none."""
    labels = []
    for i, info in enumerate(_infos(shards)):
        label = info.get(field)
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            fields = ", ".join(sorted(info)) or "none"
            raise UserError(f"{shards.url}: {shards.key(i)} has no class in {field!r} (fields: {fields}); name --label")
        labels.append(str(label))
    return labels


def _infos(shards: Shards) -> Iterator[dict[str, Any]]:
    for i in range(len(shards)):
        try:
            yield shards.info(i)
        except RecordError as error:
            raise refusal(shards, [error.dropped]) from error
