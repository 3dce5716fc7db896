"""The folder of a public model: one on this machine, or a repository of the Hugging Face hub, fetched file by file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvlp.convert.weight_files import read_weights
from fastvlp.errors import UserError, install
from fastvlp.files import read_plain
from fastvlp.plain_json import parse_json

# Files with weights, in the order in which they are looked for. An index lists the files of a model in several parts.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What a tokenizer may be kept in.
TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)


def open_public(source: str | Path | PublicFolder) -> PublicFolder:
    """The folder of a public model. `source` is its path, or the name of a repository of the hub, such as
    openai/clip-vit-base-patch32 or bert-base-chinese. Raises UserError if it is neither."""
    if isinstance(source, PublicFolder):
        return source
    path = Path(source)
    if path.is_dir():
        return PublicFolder(str(source), path)
    if path.exists():
        raise UserError(f"{source}:this is a file; give the folder of the model, with config.json and the weights")
    if str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"{source}: no such folder")
    return PublicFolder(str(source), None)


class PublicFolder:
    """A folder of a public model. `local` is None if it is on the hub."""

    def __init__(self, source: str, local: Path | None):
        self.source, self.local = source, local

    def find(self, name: str) -> Path | None:
        """The path of a file on this machine; None if the model has no such file. Raises UserError if the hub cannot be
        asked."""
        if self.local is not None:
            path = self.local / name
            return path if path.is_file() else None
        return _fetch(self.source, name)

    def file(self, *names: str) -> Path:
        """The path of the first of these files that there is. Raises UserError if there is none."""
        for name in names:
            if (path := self.find(name)) is not None:
                return path
        raise UserError(f"{self.source}: it has no {' or '.join(names)}; give the folder of a complete model")

    def json(self, name: str) -> dict[str, Any] | None:
        """An object; None if there is no such file. Raises UserError if it is damaged."""
        path = self.find(name)
        if path is None:
            return None
        try:
            value = parse_json(read_plain(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); copy the folder again") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}: holds no object; copy the folder again")
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json. Raises UserError if it has none, or is no model of transformers."""
        if self.local is not None and (self.local / "model.json").is_file():
            raise UserError(f"{self.source}: a run of fastvlp, not a public model; start from it with `init`")
        config = self.json("config.json")
        if config is None or "model_type" not in config:
            what = "it has no config.json" if config is None else "its config.json names no model_type"
            raise UserError(
                f"{self.source}: {what}; give the folder of a transformers model, or convert a model of another layout with "
                f"`vlp convert`"
            )
        return config

    def weight_files(self) -> list[Path]:
        """The files with its weights, all of which are then on this machine. Raises UserError if one is missing."""
        first = self.file(*WEIGHTS)
        if first.suffix != ".json":
            return [first]
        return [self.file(name) for name in part_names(first, self.json(first.name))]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All tensors by name, with floating-point tensors in fp32. They are read when they are first needed. Raises
        UserError if a file is missing or damaged."""
        tensors = {name: x for path in self.weight_files() for name, x in read_weights(path).items()}
        return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}

    def whole(self) -> Path:
        """The folder itself, of which every file that there is has been fetched but weights."""
        if self.local is not None:
            return self.local
        names = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
        paths = [path for name in (*names, *TOKENIZERS) if (path := self.find(name)) is not None]
        return paths[0].parent


def part_names(path: Path, index: dict[str, Any] | None) -> list[str]:
    """The files of weights that an index lists. Raises UserError if it lists none, or one outside the folder."""
    parts = (index or {}).get("weight_map")
    names = sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{path}: damaged, its weight_map lists no files of this folder; copy the folder again")
    return names


@contextmanager
def _without_warnings(library: str) -> Iterator[None]:
    """Context in which a library logs errors alone: each attempt to reach the hub would be a warning before the one error."""
    log = logging.getLogger(library)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _fetch(source: str, name: str) -> Path | None:
    offline = (
        f"where the hub cannot be reached, copy the model's files there (`hf download {source}`) and name their folder"
    )
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(f"{source}: no such folder; to fetch it from the hub, {install('towers')}") from None
    try:
        with _without_warnings("huggingface_hub"):
            return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:
        # Without a connection: another file of the model in the cache says that it has no such file.
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return None
        raise UserError(f"{source}: no such folder, and the hub does not answer; {offline}") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # the client passes on the errors of several libraries
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{source}: no such folder, and the hub gives no {name} ({reason}); {offline}") from error
