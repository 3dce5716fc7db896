"""A public model in place of an export: it is converted when it is loaded, as `vlp convert` would do it."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

CONFIGS = ("config.json", "open_clip_config.json")
# OWNER/NAME of the Hugging Face hub.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_public(source: str | Path) -> bool:
    """Whether it is the folder of a public model, or could be one's name on the hub; not a run or an export of this library."""
    path = Path(source)
    if path.is_dir():
        return not (path / "model.json").exists() and any((path / name).is_file() for name in CONFIGS)
    return not path.exists() and REPOSITORY.fullmatch(str(source)) is not None


@contextmanager
def converted(source: str | Path) -> Iterator[Path]:
    """A folder, for as long as it takes to load it, with the model as this library stores it.

    Raises UserError if there is no such model, or none that is known.
    """
    from fastvlp.convert.checkpoints import convert

    with tempfile.TemporaryDirectory() as place:
        # Its name is part of what is hashed for the fingerprint.
        folder = Path(place) / Path(source).resolve().name
        convert(str(source), folder)
        yield folder


def content_fingerprint(folder: Path) -> str:
    """Hashes what a converted folder says. The bytes of the same weights differ: the order of a file's metadata is random."""
    digest = hashlib.sha256()
    for name in ("model.json", "config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).tobytes())
    return digest.hexdigest()[:32]
