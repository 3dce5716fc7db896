"""Tensors of a PyTorch archive that `torch.load(weights_only=True)` refuses: OpenAI's TorchScript files, and checkpoints of old
trainers, which hold objects of their own beside the weights.

Nothing in an archive is executed: tensors and plain Python values are read, and any other object becomes a `Foreign`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2
from torch.storage import _get_dtype_from_pickle_storage_type


class Foreign(dict[Any, Any]):
    """An object of a class that is not known here: its attributes, as far as the archive states them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def append(self, item: Any) -> None:
        """Ignores the value: the content of a foreign list is not read."""

    def extend(self, items: Any) -> None:
        """Ignores the values, like `append`."""


REBUILD: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Reader(pickle.Unpickler):
    def __init__(self, archive: Any):
        super().__init__(io.BytesIO(archive.get_record("data.pkl")), encoding="utf-8")
        self.archive = archive
        self.storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return _get_dtype_from_pickle_storage_type(name)
        return REBUILD.get((module, name), Foreign)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"an unknown persistent object {kind!r}")
        if key not in self.storages:
            size = count * dtype.itemsize
            stored = len(self.archive.get_record(f"data/{key}"))
            if size != stored:
                raise pickle.UnpicklingError(f"storage {key} has {stored} bytes, and its tensor says {size}")
            record = self.archive.get_storage_from_record(f"data/{key}", size, torch.UntypedStorage)
            self.storages[key] = torch.storage.TypedStorage(
                wrap_storage=record._typed_storage()._untyped_storage, dtype=dtype, _internal=True
            )
        return self.storages[key]


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of a TorchScript module."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Any]:
    """Returns the contents of a zip archive of torch.save; of a TorchScript module, its tensors by name, under `state_dict`.

    Raises RuntimeError or pickle.UnpicklingError if the file is no such archive or is damaged.
    """
    archive = torch._C.PyTorchFileReader(str(path))
    value = _Reader(archive).load()
    if isinstance(value, Foreign):
        return {"state_dict": dict(_tensors(value, ""))}
    if not isinstance(value, dict):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
    return value


def _tensors(module: Foreign, prefix: str) -> list[tuple[str, Tensor]]:
    """The tensors of a module and of those within it, by dotted name."""
    tensors: list[tuple[str, Tensor]] = []
    for name, value in module.items():
        if isinstance(value, Tensor):
            tensors.append((f"{prefix}{name}", value.detach()))
        elif isinstance(value, Foreign):
            tensors += _tensors(value, f"{prefix}{name}.")
    return tensors
