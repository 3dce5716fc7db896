"""Embeddings of whole splits: every image is encoded once, and every text once, however many records have it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastvlp.data.records.interface import Records
from fastvlp.data.streams import with_progress
from fastvlp.errors import UserError
from fastvlp.eval.encoding import LoadedModel
from fastvlp.eval.split_reading import Images, image_batches
from fastvlp.model.frozen_states import ImageUse
from fastvlp.model.joint_space import unit
from fastvlp.model.model import VLModel
from fastvlp.random import hash64_rows, uniform

VIEW_SALT = 701
Features = Literal["pooled", "embedding"]


class SplitEmbeddings(NamedTuple):
    """Unit vectors of a split's images [I E] and of all their captions [T E], and the image of each caption [T]; on the
    model's device."""

    image_IE: Tensor
    text_TE: Tensor
    image_of_text_T: Tensor


def view_edges(patches: int, keep: float, views: int) -> list[int]:
    """Returns the places at which a permutation of the patches is cut into views, views + 1 numbers.

    Raises UserError if views of that size would be empty or would share patches.
    """
    edges = [round(patches * keep * v) for v in range(views + 1)]
    if not 0 < keep <= 1 or views < 1 or edges[-1] > patches or 0 in [b - a for a, b in pairwise(edges)]:
        raise UserError(
            f"`keep` {keep:g} and `views` {views} do not fit {patches} patches: each view needs at least one patch, and no "
            f"patch may be in two views, so `views` times `keep` is at most 1, such as 2 times 0.5 or 4 times 0.25"
        )
    return edges


def view_keeps(seed_B: Tensor, patches: int, keep: float, views: int) -> list[Tensor]:
    """The patches of each view of each image: `views` tensors of sorted indices [B K].

    One random permutation of an image's patches, a function of its seed, is cut into the views; so they share no patch, and
    with keep * views = 1 they cover the image.
    """
    order_BN = uniform(seed_B, (patches,), VIEW_SALT).argsort(1)
    edges = view_edges(patches, keep, views)
    return [order_BN[:, a:b].sort(1).values for a, b in pairwise(edges)]


def embed_views(model: VLModel, images: Images, seed_B: Tensor, keep: float, views: int) -> Tensor:
    """Unit vectors [B E] of whole images or, for keep < 1, the normalised mean of the vectors of masked views.

    FLIP (arXiv 2212.00794, table 1d) does not say how views are combined; the mean is our choice.
    """
    if keep == views == 1:
        return model.embed_image(model.encode_image(images.image), images.regions)
    model.config.image.check_can_drop()
    keeps = view_keeps(seed_B, model.config.image.grid**2, keep, views)
    vectors = [model.embed_image(model.encode_image(images.image, kept), images.regions) for kept in keeps]
    return unit(torch.stack(vectors).mean(0))


def image_features(model: VLModel, images: Images, features: Features = "pooled") -> Tensor:
    """Features of images for a linear probe, fp32 [B D].

    `embedding` is the image's vector in the joint space, `pooled` what the projection into that space reads. A model
    without a joint space gives the mean of its image states as `pooled`.
    """
    state_BKD = model.encode_image(images.image)
    if features == "embedding":
        return model.embed_image(state_BKD, images.regions)
    if model.config.embed is None:
        return state_BKD.mean(1).float()
    return model.embed.image.summary(state_BKD, regions=images.regions).float()


def embed_images(loaded: LoadedModel, shards: Records) -> Tensor:
    """Unit vectors [I E] of the first image of every record."""
    vectors = _embed_images(loaded, shards)
    return unit(vectors + _embed_images(loaded, shards, mirrored=True)) if loaded.mirror else vectors


def _embed_images(loaded: LoadedModel, shards: Records, mirrored: bool = False) -> Tensor:
    parts = []
    # A model with fusion layers was trained on all states, which are stored already.
    use: ImageUse = "embedding" if loaded.model.config.fusion is None else "states"
    use = use if loaded.keep == loaded.views == 1 else "pixels"
    with loaded.inference():
        for rows, images in image_batches(shards, loaded, use=use, mirrored=mirrored):
            seed_B = hash64_rows(0, torch.arange(rows.start, rows.stop)).to(loaded.device)
            parts.append(embed_views(loaded.model, images.to(loaded.device), seed_B, loaded.keep, loaded.views))
    return torch.cat(parts)


def embed_texts(loaded: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Unit vectors [T E] in the order of the texts.

    Equal texts are embedded once, so their vectors are equal. Texts of similar length share a batch, which saves padding.
    """
    distinct = sorted(dict.fromkeys(texts), key=len)
    parts = [distinct[first : first + loaded.batch_size] for first in range(0, len(distinct), loaded.batch_size)]
    vectors = []
    with loaded.inference():
        for part in with_progress(parts, lambda: len(parts), "batches of texts", loaded.show):
            ids_BL, length_B = loaded.tokenizer.encode(part, loaded.max_length)
            vectors.append(loaded.model.embed_text(ids_BL.to(loaded.device), length_B.to(loaded.device)))
    place = {text: t for t, text in enumerate(distinct)}
    return torch.cat(vectors)[torch.tensor([place[text] for text in texts], device=loaded.device)]


def embed_split(loaded: LoadedModel, shards: Records, captions: Sequence[Sequence[str]]) -> SplitEmbeddings:
    """Embeds a split's images and `captions`, the captions of each record."""
    image_of_text = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(its) for its in captions]))
    image_IE = embed_images(loaded, shards)
    text_TE = embed_texts(loaded, [text for its in captions for text in its])
    return SplitEmbeddings(image_IE, text_TE, image_of_text.to(loaded.device))
