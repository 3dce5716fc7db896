"""What is said of the evaluations of embeddings; nothing here imports torch, so that the command line's help answers at
once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Encode:
    """How a run reads images and texts: as it was trained to, unless told otherwise."""

    run: Positional[str]
    """Folder of the run."""
    data: str
    """Folder of shards, or of splits."""
    split: str = "test"
    """Folder in `data`, where there is one of that name."""
    batch_size: int = 256
    max_length: int | None = None
    """Tokens of a text; by default as in training."""
    fit: Literal["crop", "squash", "letterbox"] | None = None
    """How an image becomes a square; by default as in training."""
    precision: Literal["fp32", "bf16"] | None = None
    """By default as in training."""
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Masked(Encode):
    """FLIP's masked inference is by choice: by default the whole image is seen."""

    keep: float = 1.0
    """Share of the patches that a view of the image shows."""
    views: int = 1
    """Views of different patches, whose embeddings are averaged; 2 at --keep 0.5 cover the image."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(Masked):
    """Find images by their captions and captions by their images, among all of a split."""

    captions: str | None = None
    """Field of the records with the captions; by default as in training."""
    rerank: str | None = None
    """Folder of a run whose fusion layers score the best candidates once more, or `self`."""
    rerank_by: Literal["match", "likelihood"] | None = None
    """Its image-text matching head, or how likely it finds the caption; by default the head, where there is one."""
    top: int = 16
    """Candidates of each query that are scored once more."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Masked):
    """Classify images by the names of the classes."""

    classes: str | None = None
    """A .txt with a class a line, or a .json {label: name, or list of names}; by default the labels of the data."""
    templates: str = "flip7"
    """simple (the bare name), flip7, openai80, zh7, or a file with a template a line, `{}` where the name goes."""
    label: str = "label"
    """Field of the records with the class."""


@dataclass(frozen=True, kw_only=True)
class Probe(Encode):
    """Logistic regression on frozen image features. The data is a folder of splits: train, maybe val, and the one that is
    scored."""

    split: Literal["val", "test"] = "test"
    """What is scored. With `val` the strength is chosen on a tenth of train."""
    features: Literal["pooled", "embedding"] = "pooled"
    """Of the image, before or after the projection into the joint space."""
    label: str = "label"
    """Field of the records with the class."""
    prefix: str = ""
    """Of the splits' names: singles- for the demo corpus's singles-train and singles-test."""
