"""Files of tensors, checked before they are used: checkpoints of torch.save, and safetensors with a checksum of our own.

A checkpoint is a zip, whose members have a CRC-32 that torch does not compare. Safetensors has none; we keep one as metadata.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.storage import _get_dtype_from_pickle_storage_type

from fastvlp.plain_json import CHECKSUM, checksum

CHUNK = 1 << 22
# Bytes of the code in an archive of TorchScript, which is packed.
MOST_CODE = 1 << 26


class DamagedFileError(ValueError):
    """The file is not what was written, or not of its kind."""


class TensorFile(NamedTuple):
    """The content of a file of safetensors: tensors by name, and texts by name."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors, contiguous and on the CPU, and a checksum of them and of the metadata. Raises as `save_file`."""
    with_sum = {**metadata, CHECKSUM: _checksum(tensors, metadata)}
    save_file(dict(tensors), path, metadata=with_sum)


def read_safetensors(path: Path) -> TensorFile:
    """Raises DamagedFileError if a tensor or a text is not what was written (files of others have no checksum), and as
    `safe_open`, which compares the header with the size of the file before it reads a tensor."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(tensors, metadata):
        raise DamagedFileError("its checksum is another than when it was written")
    return TensorFile(tensors, metadata)


def read_some(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of the name. The others are not read, so that there is no
    checksum to compare. Raises as `safe_open`."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file of safetensors, by name; no tensor is read. Raises as `safe_open`."""
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def file_checksum(path: Path) -> str:
    """The checksum of the bytes of a file. Raises OSError."""
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(CHUNK), b""))


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    def parts() -> Iterator[Any]:
        yield repr(sorted(metadata.items())).encode()
        for name, x in sorted(tensors.items()):
            yield f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode()
            yield x.reshape(-1).view(torch.uint8).numpy()

    return checksum(parts())


def not_finite(tensors: Mapping[str, Tensor], buffers: Collection[str] = ()) -> list[str]:
    """Names of the tensors with a number that is NaN or infinite. `buffers` may be infinite, as masks are, but not NaN."""
    wrong = [name for name, x in tensors.items() if x.is_floating_point() and x.numel() and not _is_finite(x)]
    return [name for name in wrong if name not in buffers or bool(tensors[name].isnan().any())]


def _is_finite(x: Tensor) -> bool:
    # Twenty times as fast as `isfinite` of each number: NaN is its own least and greatest.
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_torch_file(path: Path, *, scripted: bool = False) -> None:
    """Compares the members of a file of torch.save with their checksums, and the sizes that its tensors state with those of the
    members, which torch trusts. Raises DamagedFileError or OSError.

    `scripted`: it is an archive of TorchScript, whose members may be packed; its tensors are not compared.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked_members(archive, path.stat().st_size, MOST_CODE if scripted else 0)
            if not scripted:
                _Sizes(archive, members).load()
    except OSError:
        raise
    # Given hostile bytes, readers of zip and pickle raise anything from struct.error to RecursionError.
    except Exception as error:
        raise DamagedFileError(str(error) or type(error).__name__) from error


def _checked_members(archive: zipfile.ZipFile, size: int, packed: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name, after each was compared with its checksum. `packed`: how many bytes may be in packed members."""
    members = {member.filename: member for member in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise DamagedFileError("two members have one name")
    # Torch stores its members as they are. One that is packed may unfold to a thousand times its size, and so may members that
    # share their bytes.
    sizes = {True: 0, False: 0}
    for member in members.values():
        sizes[member.compress_type == zipfile.ZIP_STORED] += member.file_size
    if sizes[False] > packed:
        raise DamagedFileError("it has packed members")
    if sizes[True] > size:
        raise DamagedFileError("its members are larger than the file")
    for member in members.values():
        with archive.open(member) as file:
            while file.read(CHUNK):
                pass  # `read` raises BadZipFile at the end of a member with another checksum
    return members


# The reader that is written in Python: the one in C allocates what a hostile file claims of its memo.
class _Sizes(pickle._Unpickler):
    """Reads the structure of a checkpoint without its tensors, to compare the sizes of their storages. No class of the file is
    looked up and nothing called."""

    def __init__(self, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]):
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise DamagedFileError("it has no data.pkl")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.members = members
        super().__init__(archive.open(pickles[0]))

    def find_class(self, module: str, name: str) -> Any:
        kind = type(name, (_Part,), {})
        kind.__module__ = module
        return kind

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        name = kind.__name__
        width = 1 if name == "UntypedStorage" else _get_dtype_from_pickle_storage_type(name).itemsize
        if count * width != self.members[f"{self.prefix}data/{key}"].file_size:
            raise DamagedFileError(f"a tensor states {count} numbers, and its storage has another size")
        return _Part()


class _Part:
    """Stands for whatever a checkpoint holds besides numbers, texts and their containers."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Part:
        return super().__new__(cls)

    def _take(self, *args: Any, **kwargs: Any) -> None:
        """Takes what a pickle gives to an object that it builds, and keeps nothing."""

    __init__ = __setstate__ = __setitem__ = append = extend = _take
