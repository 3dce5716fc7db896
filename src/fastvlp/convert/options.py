"""What is said of public weights; apart from the code, so that the command line's help needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

Family = Literal["uniter", "bert", "open_clip", "flip", "brivl", "flm"]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Make of a released checkpoint a folder like a run's, which `vlp pretrain --from`, `vlp finetune --from`, `vlp evaluate`
    and `vlp export` read, each as far as the model can."""

    family: Positional[Family]
    """Whose layout the checkpoint has. uniter: as pretrained, base or large. bert: a start for UNITER, whose regions are
    fresh. open_clip: both towers, OpenAI's too. flip: its parameters, names joined by "/", as .safetensors. brivl: text
    tower and heads; the image tower is fresh. flm: as pretrained."""
    checkpoint: Positional[Path]
    """A .safetensors file or a PyTorch file; nothing in it is executed."""
    out: Positional[Path]
    """Folder to write."""
    tokenizer: Path | None = None
    """The checkpoint's own tokenizer.json; by default the one beside it."""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """open_clip, whose files do not tell: quick_gelu for weights of OpenAI, by default where the file is OpenAI's own; else
    gelu."""


@dataclass(frozen=True, kw_only=True)
class Towers:
    """Make a model to start from of public towers: CLIP ViT-B/32's image tower and RoBERTa-base's first 6 layers, as FLM
    does. Each is a file, a folder, or owner/repository of the Hugging Face hub."""

    out: Path
    """Folder to write; `vlp pretrain flm_base --init` reads it."""
    clip: str = "openai/clip-vit-base-patch32"
    """model.safetensors (or a state dict) of CLIP."""
    roberta: str = "FacebookAI/roberta-base"
    """The same of RoBERTa."""
    tokenizer: str | None = None
    """RoBERTa's tokenizer.json; by default from where RoBERTa is."""
