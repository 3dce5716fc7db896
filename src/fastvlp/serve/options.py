"""What is said of exports, embedding and indexes; nothing here imports torch, so that the command line's help answers at
once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from fastvlp.serve.limits import Limits


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


@dataclass(frozen=True, kw_only=True)
class Serve(Device):
    """Serve a model over HTTP: embeddings and scores, search in an index with a page for people, and what it says of
    pictures. OpenAPI at /openapi.json, Prometheus at /metrics."""

    export: Positional[str]
    """Folder that `vlp export` wrote."""
    index: str | None = None
    """As of `vlp index build`; without one there is no search."""
    create: bool = False
    """Make an empty index where there is none."""
    pictures: Path | None = None
    """Folder of the items' pictures; by default `pictures` in the index's own; of codes: they are read from the shards."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines ask."""
    port: int = 8000
    api_key: tuple[str, ...] = ()
    """Requests need one of these keys as a bearer token. Other users of this machine can read a command line: the
    variable FASTVLP_API_KEY does as well."""
    allow_origin: tuple[str, ...] = ()
    """Other sites whose pages may ask, such as https://example.org; * for all."""
    report: Path | None = None
    """HTML of the run's report, shown at /report; by default report.html in the export, where there is one."""
    limits: Limits = field(default_factory=Limits)
