"""A public checkpoint as it is found: the folder or file, the configs beside the weights, and the tensors."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvlp.convert.public_folder import WEIGHTS, PublicFolder, open_public, part_names
from fastvlp.convert.weight_files import Contents, read_contents, tensor_names
from fastvlp.errors import UserError, install
from fastvlp.files import read_plain
from fastvlp.plain_json import parse_json

# Files with weights as other projects call them.
OTHER_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def open_checkpoint(source: str, config: Path | None = None) -> Checkpoint:
    """A folder, a file of weights, or a repository of the hub. `config`: a file that takes the place of config.json.

    Raises UserError if there is no such source, or the config is damaged.
    """
    path = Path(source)
    stated = None if config is None else read_config_file(config)
    if (path / "model.json").is_file():
        raise UserError(
            f"{source}: a run or an export of fastvlp already; start a run from it with `vlp pretrain RECIPE --from FOLDER`"
        )
    if path.is_file():
        return Checkpoint(source, path.parent, file=path, stated=stated)
    return Checkpoint(source, open_public(source).local, stated=stated)


def read_config_file(path: Path) -> dict[str, Any]:
    """An object in JSON or YAML. Raises UserError if there is none."""
    try:
        text = read_plain(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read a config here ({error})") from error
    try:
        value = parse_json(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not an object of names and values; name the config of the checkpoint")
    return value


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError(f"a config in YAML: {install('towers')}, or write it as JSON") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error


class Checkpoint(PublicFolder):
    """A public checkpoint."""

    def __init__(
        self, source: str, local: Path | None, *, file: Path | None = None, stated: dict[str, Any] | None = None
    ):
        """`file`: the file of weights, where the source is one. `stated`: a config in place of config.json."""
        super().__init__(source, local)
        self.named, self.stated = file, stated

    def json(self, name: str) -> dict[str, Any] | None:
        if name == "config.json" and self.stated is not None:
            return self.stated
        return super().json(name)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json, or what the user names in its place; empty if there is none."""
        return self.json("config.json") or {}

    @property
    def model_type(self) -> str | None:
        """The model_type of the model in transformers; None if it is not a transformers model."""
        name = self.settings.get("model_type")
        return name if isinstance(name, str) else None

    @cached_property
    def open_clip(self) -> dict[str, Any] | None:
        """open_clip's config of the model; None if there is none."""
        own = self.json("open_clip_config.json")
        if own is None and {"embed_dim", "vision_cfg"} <= self.settings.keys():
            # A file of open_clip's own folder model_configs.
            own = {"model_cfg": self.settings}
        return own

    @cached_property
    def contents(self) -> Contents:
        """The content of the files of weights, with floating-point tensors in fp32."""
        tensors: dict[str, Tensor] = {}
        other: dict[str, Any] = {}
        for path in self.files:
            own, more = read_contents(path)
            tensors |= {name: x.float() if x.is_floating_point() else x for name, x in own.items()}
            other |= more
        return Contents(tensors, other)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.contents.tensors

    @cached_property
    def files(self) -> list[Path]:
        """The files of weights. Raises UserError if there are none, or several that are not parts of one model."""
        if self.named is not None:
            return [self.named]
        first = next((path for name in (*WEIGHTS, *OTHER_WEIGHTS) if (path := self.find(name)) is not None), None)
        if first is None:
            first = self._only_file()
        if first.suffix != ".json":
            return [first]
        return [self.file(name) for name in part_names(first, self.json(first.name))]

    def _only_file(self) -> Path:
        here = [] if self.local is None else sorted(self.local.iterdir())
        files = [path for path in here if path.suffix in SUFFIXES and path.is_file()]
        if len(files) != 1:
            names = f"several files of weights: {', '.join(path.name for path in files[:5])}" if files else "no weights"
            looked = ", ".join((*WEIGHTS, *OTHER_WEIGHTS))
            raise UserError(f"{self.source}: {names}; looked for {looked}: name the file itself")
        return files[0]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all tensors, which are not read where the files can list them."""
        if all(path.suffix == ".safetensors" for path in self.files):
            return frozenset(name for path in self.files for name in tensor_names(path))
        return frozenset(self.weights)


def read_answers(path: Path | None) -> tuple[str, ...]:
    """Answers in the order of a model's outputs: a JSON list, or an object from answers to numbers or from numbers to answers.
    Empty where no file is named; raises UserError if it holds anything else."""
    if path is None:
        return ()
    try:
        value = parse_json(read_plain(path))
        if isinstance(value, dict):
            pairs = [(int(n), a) if isinstance(a, str) else (int(a), n) for n, a in value.items()]
            value = (
                [answer for _, answer in sorted(pairs)]
                if [n for n, _ in sorted(pairs)] == [*range(len(pairs))]
                else None
            )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot read answers here ({error}); `answers` is a JSON list") from error
    if not isinstance(value, list) or not value or not all(isinstance(answer, str) for answer in value):
        raise UserError(f"{path}: neither a list of answers nor an object that numbers them from 0")
    return tuple(value)
