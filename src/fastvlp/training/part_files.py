"""The tensors of a sharded run's checkpoint. Each rank writes its own parts, and any number of ranks can read them.

The files are safetensors in the layout of PyTorch's distributed checkpoint (DCP), and are read by DCP's reader. DCP's own
index, a pickle, is neither written nor read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastvlp import dist
from fastvlp.errors import UserError, remedy
from fastvlp.files import whole_file
from fastvlp.tensor_files import DamagedFileError, file_checksum

# While the checkpoint names one of the folders, the other one is written.
FOLDERS = ("last-a", "last-b")
# Key under which DCP's reader finds the place of each part in its tensor.
PLACES = "DCP_SHARDING_INFO"
KINDS = ("pretraining", "optimiser", "ema")


class Parts(NamedTuple):
    """The parts of tensors that one rank saves, on the CPU, and the index in its tensor at which each begins."""

    tensors: dict[str, Tensor]
    places: dict[str, list[int]]


def next_folder(run: Path, current: str | None) -> str:
    """Empties and returns the one of `FOLDERS` that the checkpoint does not name. Raises UserError if it cannot be written."""
    folder = run / next(name for name in FOLDERS if name != current)
    try:
        folder.mkdir(exist_ok=True)
        clear(folder)
    except OSError as error:
        advice = remedy(error, "choose another folder")
        raise UserError(f"{folder}: cannot write ({error.strerror}); {advice}") from error
    return folder.name


def clear(folder: Path) -> None:
    """Removes the files of a folder, if it exists. Raises OSError."""
    for path in folder.glob("*"):
        path.unlink()


def remove_parts(run: Path, keep: str | None) -> None:
    """Removes the folders that the checkpoint does not name. It does no harm if one cannot be removed."""
    for folder in (run / name for name in FOLDERS if name != keep):
        with suppress(OSError):
            clear(folder)
            folder.rmdir()


def write_parts(folder: Path, parts: Parts) -> dict[str, str]:
    """Writes this rank's file. Returns its name and checksum. Raises UserError if the disk is full or not writable."""
    path = folder / f"{dist.rank():05d}.safetensors"
    places = json.dumps({name: {"saved_offsets": place} for name, place in parts.places.items()})
    with whole_file(path, f"{path.name}.tmp") as file:
        try:
            save_file(parts.tensors, file, {PLACES: places})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error
    return {path.name: file_checksum(path)}


def named_parts(files: Any) -> tuple[str, dict[str, str]]:
    """Returns the folder and the checksums of a checkpoint's files. Raises an error if the checkpoint's entry is invalid."""
    folder, checksums = files["folder"], dict(files["checksums"])
    if folder not in FOLDERS or any(Path(name).name != name for name in checksums):
        raise ValueError(f"its parts are {folder}, {', '.join(checksums)}")
    return folder, checksums


def check_parts(folder: Path, checksums: Mapping[str, str]) -> None:
    """Compares the files with their checksums. Each rank compares some of them. Raises UserError, on all ranks, if a file
    differs, is missing or cannot be read."""
    with dist.together(torch.device("cpu")):
        for name in sorted(checksums)[dist.rank() :: dist.world()]:
            path = folder / name
            try:
                same = path.is_file() and file_checksum(path) == checksums[name]
            except OSError as error:
                advice = remedy(error, "restore the folder or start the run anew")
                raise UserError(f"{path}: cannot read ({error.strerror}); {advice}") from error
            if not same:
                raise UserError(f"{path}: not the file that was saved; restore the folder or start the run anew")


def with_tensors(
    folder: Path, saved: Mapping[str, Any], kinds: Collection[str] = KINDS, like: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Returns a checkpoint with the tensors of some `kinds`, read from its files. `like`: tensors by name; a tensor of that
    name is divided in the same way, and moments like the parameter with their number. All other tensors are whole and on the
    CPU."""
    result = dict(saved)
    for kind in kinds:
        found = read(folder, kind, like or {})
        if kind != "optimiser":
            result[kind] = found or None
            continue
        state: dict[int, dict[str, Tensor]] = {}
        for name, x in found.items():
            number, _, moment = name.partition(".")
            state.setdefault(int(number), {})[moment] = x
        result[kind] = {**saved[kind], "state": state}
    return result


def read(folder: Path, kind: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the tensors whose names begin with `kind` and a dot, by the rest of the name. A rank reads only the parts that it
    keeps. Raises ValueError if the parts of a tensor are not complete."""
    # These modules take long to import, and only sharded runs need them.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    found: dict[str, Any] = {}
    for name, whole in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(f"{kind}."):
            continue
        assert isinstance(whole, TensorStorageMetadata)
        # This check limits the memory to the numbers in the files, whatever sizes they state.
        if sum(chunk.sizes.numel() for chunk in whole.chunks) != whole.size.numel():
            raise DamagedFileError(f"{name} is not whole")
        own, dtype = like.get(name, like.get(name.rpartition(".")[0])), whole.properties.dtype
        if own is not None and (own.shape, own.dtype) == (whole.size, dtype):
            found[name] = torch.zeros_like(own)
        else:
            found[name] = torch.zeros(whole.size, dtype=dtype)
    try:
        with warnings.catch_warnings():
            # The warning says that DCP does not ask other ranks. That is not necessary, since each knows what it needs.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(found, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        # Callers would not catch this error, because it is not an `Exception`.
        raise next(iter(error.failures.values()))[0] from error
    return {name.removeprefix(f"{kind}."): x for name, x in found.items()}
