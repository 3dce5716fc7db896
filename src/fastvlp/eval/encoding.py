"""Encoding of images and texts by a saved run: the options, and the loaded model with its tokenizer and preprocessing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from tyro.conf import arg

from fastvlp.data.records.transform import Fit
from fastvlp.data.regions import RegionSource
from fastvlp.data.state_store import StatesConfig
from fastvlp.data.tokenize import Tokenizer
from fastvlp.dist import Precision, PrecisionChoice, pick_device, pick_precision
from fastvlp.errors import UserError
from fastvlp.model.freezing import evaluating
from fastvlp.model.frozen_states import states_config
from fastvlp.model.model import VLModel
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import Saved, load_model

# The folder of the run that an evaluation scores.
RunFolder = Annotated[str | Path, arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Options of encoding images and texts. Options that are not given are as in the training of the run."""

    batch_size: int = 256
    """Number of images, or of texts, that are encoded at a time."""
    max_length: int | None = None
    """Largest number of tokens of a text, including `<s>` and `</s>`; the rest of a longer text is cut off."""
    fit: Fit | None = None
    """How an image becomes a square: by cropping, by squashing, or with bars at its edges."""
    precision: PrecisionChoice = "auto"
    """Precision of the computation: fp32, bf16, or `auto`, which is bf16 if the model was trained in bf16 and the device
    computes bf16 fast."""
    device: str = "auto"
    """Device such as cpu or cuda:1; `auto` takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads that PyTorch uses; by default PyTorch chooses."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"`batch_size` must be at least 1, not {self.batch_size}")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"`max_length` must be at least 2 (a text's start and end), not {self.max_length}")


@dataclass(frozen=True, kw_only=True)
class MaskedEncoding(Encoding):
    """Options of encoding images and texts. Options that are not given are as in the training of the run, except that whole
    images are encoded, even if training dropped patches."""

    keep: float = 1.0
    """Share of an image's patches in a view of it (FLIP)."""
    views: int = 1
    """Number of views of an image whose embeddings are averaged. No patch is in two views, so 2 views of half of the patches
    show the whole image."""
    mirror: bool = False
    """Average the embeddings of an image and of its mirror image."""


AS_IN_TRAINING = Encoding()
WHOLE_IMAGES = MaskedEncoding()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer and the options of encoding images and texts.

    Attributes:
        regions: where the boxes come from, for a model that reads boxes.
        states: how states of the image encoder are stored; None if images are encoded each time.
        keep: share of the patches in a view of an image.
        views: views of an image.
        mirror: whether the embeddings of an image and of its mirror image are averaged.
        show: whether progress bars are printed.
    """

    model: VLModel
    tokenizer: Tokenizer
    batch_size: int = 256
    max_length: int = 50
    fit: Fit = "crop"
    regions: RegionSource | None = None
    states: StatesConfig | None = None
    precision: Precision = "fp32"
    keep: float = 1.0
    views: int = 1
    mirror: bool = False
    show: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def inference(self) -> Iterator[None]:
        """A context without gradients and dropout, in the number type of `precision`."""
        bf16 = self.precision == "bf16"
        with evaluating(self.model), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            yield


class OpenedRun(NamedTuple):
    """captions: the field of the records with the captions that the run was trained on."""

    loaded: LoadedModel
    saved: Saved
    captions: str


def open_run(run: str | Path, encoding: Encoding = AS_IN_TRAINING) -> OpenedRun:
    """Loads the weights of a run, ready to encode as in its training, except for what `encoding` gives.

    Raises UserError if the folder is no run, or is damaged.
    """
    if encoding.threads:
        torch.set_num_threads(encoding.threads)
    saved = load_model(run)
    trained = read_saved_run(run)
    data = trained.data
    device = pick_device(encoding.device)
    loaded = LoadedModel(
        model=saved.model.to(device),
        tokenizer=saved.tokenizer,
        batch_size=encoding.batch_size,
        max_length=min(encoding.max_length or data.max_length, saved.model.config.longest_text),
        fit=encoding.fit or data.fit,
        regions=data.regions,
        states=states_config(saved, trained),
        precision=pick_precision(encoding.precision, device, trained.precision),
        keep=encoding.keep if isinstance(encoding, MaskedEncoding) else 1.0,
        views=encoding.views if isinstance(encoding, MaskedEncoding) else 1,
        mirror=isinstance(encoding, MaskedEncoding) and encoding.mirror,
        show=True,
    )
    return OpenedRun(loaded, saved, data.captions)


def open_towers(run: str | Path, encoding: Encoding = AS_IN_TRAINING) -> OpenedRun:
    """Opens a run like `open_run`. Raises UserError if the model does not embed images and texts."""
    opened = open_run(run, encoding)
    if opened.loaded.model.config.embed is None:
        raise UserError(
            f"{run}: this model does not embed images and texts, which the evaluation compares; "
            f"give a run that was trained with `model.embed`, such as one of the recipe flip_photos"
        )
    return opened
