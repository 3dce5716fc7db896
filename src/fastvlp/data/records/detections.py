"""A detector's regions of an image as a shard keeps them: one npz with the names of UNITER's arrays (ChenRocks/UNITER)."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# 100 regions of 2048 numbers and 1601 shares are 0.7 MB in half precision; a zip may claim to hold terabytes.
MOST_BYTES = 1 << 26
TOLERANCE = 0.005


class Detections(NamedTuple):
    """R regions by falling confidence: boxes x0 y0 x1 y1 as fractions of the stored image, float32; features and shares of
    C classes, float16."""

    box_R4: np.ndarray
    feature_RF: np.ndarray
    classes_RC: np.ndarray | None


def check_arrays(arrays: Mapping[str, Any]) -> Detections:
    """Regions in the order of the arrays `norm_bb` [R 4 or more: x0 y0 x1 y1], `features` [R F] and, where there are any,
    `soft_labels` [R C]. Raises ValueError saying what is wrong with them."""
    box, feature, classes = (arrays.get(name) for name in ("norm_bb", "features", "soft_labels"))
    if box is None or feature is None:
        raise ValueError(f"norm_bb and features are needed, found {', '.join(sorted(map(str, arrays))) or 'nothing'}")
    box = _check_table(box)
    # What is too large for half precision becomes infinite, and is refused below.
    with np.errstate(over="ignore"):
        half = [None if x is None else _check_table(x, len(box)).astype(np.float16) for x in (feature, classes)]
    box = box.astype(np.float32)[:, :4]
    if box.shape[1] != 4 or not all(np.isfinite(x).all() for x in (box, *half) if x is not None):
        raise ValueError("norm_bb has fewer than 4 columns, or a number is not finite")
    # Extractors that divide by the width less 1 are a little above 1.
    if box.size and (box.min() < -TOLERANCE or box.max() > 1 + TOLERANCE):
        raise ValueError("norm_bb has a box outside 0 to 1; divide x by the image's width and y by its height")
    box = box.clip(0, 1)
    if (box[:, :2] > box[:, 2:]).any():
        raise ValueError("norm_bb has a box with x0 > x1 or y0 > y1; fractions of width and height are expected")
    assert half[0] is not None
    return Detections(box, half[0], half[1])


def _check_table(x: Any, rows: int | None = None) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or rows not in (None, len(x)) or x.dtype.kind != "f":
        expected = "" if rows is None else f" with {rows} rows"
        raise ValueError(f"each array is a table of floats{expected}, and one is {x.dtype} {list(x.shape)}")
    return x


def pack(regions: Detections) -> bytes:
    """The npz of an image's regions."""
    file = io.BytesIO()
    arrays = {"norm_bb": regions.box_R4, "features": regions.feature_RF, "soft_labels": regions.classes_RC}
    present: dict[str, Any] = {name: x for name, x in arrays.items() if x is not None}
    np.savez(file, **present)
    return file.getvalue()


def unpack(data: bytes) -> Detections:
    """The regions in an npz that `pack` made. Raises ValueError if it is anything else."""
    return check_arrays(read_npz(data))


def read_npz(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an npz. Nothing in it is executed. Raises ValueError if it cannot be read."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                raise ValueError(f"holds more than {MOST_BYTES >> 20} MiB")
            for member in archive.infolist():
                _check_size(archive, member)
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            if len(set(file.files)) != len(file.files):
                raise ValueError("holds two arrays of one name")
            return {name: file[name] for name in file.files}
    except ValueError:
        raise
    # Given hostile bytes, zip, zlib and npy readers raise anything.
    except Exception as error:
        raise ValueError(f"not readable as npz ({type(error).__name__}: {error})") from None


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises ValueError if an array states another size than its member has: numpy allocates what it states."""
    with archive.open(member) as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            return  # no array
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        if dtype.hasobject:
            return  # numpy refuses it
        stated = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or stated != member.file_size - file.tell():
            raise ValueError(f"{member.filename} states {stated} bytes and has others")
