"""What is said of exports, embedding and indexes; nothing here imports torch, so that the command line's help answers at
once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand


@dataclass(frozen=True, kw_only=True)
class Export:
    """Make of a run a folder that stands alone: config, weights, tokenizer, and a model card filled from the run."""

    run: Positional[str]
    """Folder of the run."""
    out: Positional[Path]
    """Folder to write."""
    weights: Literal["best", "last"] = "best"
    license: str = ""
    """Of the weights, for the card; a placeholder stands where none is given."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What an export runs on."""

    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Embed(Device):
    """Turn shards into unit vectors of their images and captions. Under `torchrun` the ranks share the work; started
    again, it continues where it was stopped."""

    export: Positional[str]
    """Folder that `vlp export` wrote."""
    data: Positional[str]
    """Folder of shards."""
    out: Positional[Path]
    """Folder to write: parts as safetensors, each with its ids and captions, and dropped.jsonl."""
    captions: tuple[str, ...] | None = None
    """Fields of the records with the captions, such as captions captions_zh; by default what the model was trained on."""
    batch_size: int = 256
    per_part: int = 1000
    """Records of a file."""


@dataclass(frozen=True, kw_only=True)
class IndexBuild(Device):
    """Add the images of shards to an index, which is made where there is none. Ids that it has already get the new vector:
    stopped, it can be started again."""

    index: Positional[str]
    """A folder, http://HOST:PORT/NAME of a Chroma server, or postgresql://USER@HOST/DATABASE of one with pgvector."""
    embedded: Positional[Path | None] = None
    """Folder that `vlp embed` wrote."""
    export: str | None = None
    """Instead of it: a model, to embed --data with."""
    data: str | None = None
    """Folder of shards; with an embedded folder, where they are now."""
    captions: tuple[str, ...] | None = None
    """As of `vlp embed`."""
    batch_size: int = 256
    images: Literal["keep", "none"] = "keep"
    """Whether pictures of at most 320 pixels are stored for the page to show."""
    pictures: Path | None = None
    """Folder for them; by default `pictures` in the index's own. An index by URL has none: say where."""
    prefix: str = ""
    """Put before the records' keys to make ids, so that several data sets fit into one index."""


@dataclass(frozen=True, kw_only=True)
class IndexSearch(Device):
    """Find the images of an index by a text, by an image, or by both at once."""

    index: Positional[str]
    export: str
    """Folder of the model that the index was built with."""
    text: str | None = None
    image: Path | None = None
    where: tuple[str, ...] = ()
    """FIELD=VALUE: only images of which all of these hold, such as label=cat."""
    k: int = 10
    """How many."""


IndexCommand = Annotated[IndexBuild, subcommand("build")] | Annotated[IndexSearch, subcommand("search")]


@dataclass(frozen=True, kw_only=True)
class Indexing:
    """Build and search an index of vectors."""

    command: Annotated[IndexCommand, arg(name="")]
