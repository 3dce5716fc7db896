"""What is said of data; nothing here imports torch, so that the command line's help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand


@dataclass(frozen=True, kw_only=True)
class DataDemo:
    """Write the embedded corpus: rendered scenes with captions, questions and statements."""

    out: Path = Path("demo/world")
    """Folder to write."""
    seed: int = 0
    size: int = 64
    """Side of a picture in pixels."""
    captions: int = 5
    """Captions of a scene."""
    train: int = 6000
    """Scenes to train on."""
    val: int = 500
    test: int = 1000
    """Scenes with combinations of colour and shape that training never shows."""
    pairs: int = 3000
    """Pairs of scenes with statements about both, to train on."""
    singles: int = 256
    """Pictures of one object, for zero-shot classification."""


@dataclass(frozen=True, kw_only=True)
class DataImport:
    """Import what you have into shards: every image is decoded once, what is broken is dropped and named."""

    source: Positional[Path]
    """A csv, tsv, jsonl or parquet file; a folder of images with .txt beside them; WebDataset tars; Cornell NLVR; a
    folder with examples.jsonl and images.zip; the published annotations of COCO, Karpathy's splits, VQA v2, NLVR2, SNLI-VE,
    RefCOCO or VCR."""
    out: Path
    """Folder to write; each split becomes a folder of shards in it."""
    format: Literal[
        "auto", "table", "folder", "webdataset", "nlvr", "examples",
        "coco", "karpathy", "vqa", "nlvr2", "snli_ve", "refcoco", "vcr",
    ] = "auto"  # fmt: skip
    """The source's format; auto tells it from the path."""
    split: str = "train"
    """Split of the records that name none."""
    val: float = 0.0
    """Share of that split to hold out as `val`, by a hash of the key."""
    test: float = 0.0
    """Share of that split to hold out as `test`."""
    max_side: int = 0
    """Make images with a longer side than this many pixels smaller (JPEG of quality 92); 0 keeps all as they are."""
    per_shard: int = 1000
    """Records in a tar."""
    image_column: str = ""
    """Column of image paths, for tables; by default one with a usual name."""
    caption_column: str = ""
    """Column of captions, for tables; by default one with a usual name."""
    images: Literal["blank"] | Path | None = None
    """Folder that the image paths of a table or of published annotations start from; by default where these are. `blank`:
    there are no images, and a model that reads stored regions alone needs none."""
    features: Path | None = None
    """A detector's regions in UNITER's layout, a folder of npz files or an LMDB: each record gets those of its image's
    name."""


@dataclass(frozen=True, kw_only=True)
class DataInspect:
    """Show what is in a folder of shards, name every record that cannot be read, and draw a contact sheet."""

    folder: Positional[Path]
    """A split, or a folder of splits."""
    sheet: Path | None = None
    """PNG to draw 24 records into; by default contact-sheet.png in the folder."""
    tokenizer: Path | None = None
    """A tokenizer.json, to count tokens as well."""


DataCommand = (
    Annotated[DataDemo, subcommand("demo")]
    | Annotated[DataImport, subcommand("import")]
    | Annotated[DataInspect, subcommand("inspect")]
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Make, import and inspect data."""

    command: Annotated[DataCommand, arg(name="")]
