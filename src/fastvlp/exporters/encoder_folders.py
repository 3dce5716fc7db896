"""One encoder of a model as a folder of transformers, which other libraries put a pooling and a projection on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvlp.convert.encoder_family import EncoderFamily, ImageFamily, TextFamily
from fastvlp.exporters.processor import write_json
from fastvlp.extensions import variants
from fastvlp.model.encoders.interface import ImageEncoder, TextEncoder
from fastvlp.model.encoders.transformers_models import quiet_transformers
from fastvlp.tensor_files import write_safetensors

FAMILIES = "fastvlp.convert"


@dataclass(frozen=True, kw_only=True)
class PublicEncoder:
    """An encoder that transformers can build.

    Attributes:
        output: Which of its outputs has the states that are pooled.
        settings: Its config.json; empty for a module of transformers.
        tensors: Its weights.
        module: A module of transformers that computes it.
    """

    output: str = "last_hidden_state"
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    module: Any = None

    def write(self, folder: Path) -> None:
        """Writes config.json and weights into a folder that is made."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.module is not None:
            with quiet_transformers():
                self.module.save_pretrained(folder)
            return
        write_json(folder / "config.json", self.settings)
        tensors = {name: x.contiguous() for name, x in self.tensors.items()}
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def public_encoder(
    base: type[EncoderFamily], encoder: ImageEncoder | TextEncoder, config: Any, state: Mapping[str, Tensor]
) -> PublicEncoder | None:
    """Returns an encoder as one of transformers; None if it has no such encoder.

    Args:
        base: ImageFamily or TextFamily.
        encoder: The encoder.
        config: Its config, with the last norm in its place.
        state: Its parameters.
    """
    if (module := encoder.public_module()) is not None:
        return PublicEncoder(module=module)
    for kind in variants(base, FAMILIES):
        family = kind()
        settings = family.settings(config)
        if settings is not None:
            tensors = family.tensors(state, settings["num_hidden_layers"])
            return PublicEncoder(settings=settings, tensors=tensors, output=family.states)
    return None


def image_encoder(encoder: ImageEncoder, config: Any, state: Mapping[str, Tensor]) -> PublicEncoder | None:
    """Returns an image encoder as one of transformers; None if it has none, or gives a map instead of tokens."""
    converted = public_encoder(ImageFamily, encoder, config, state)
    return None if converted is not None and converted.module is not None and not config.prefix else converted


def text_encoder(encoder: TextEncoder, config: Any, state: Mapping[str, Tensor]) -> PublicEncoder | None:
    """Returns a text encoder as one of transformers; None if it has none."""
    return public_encoder(TextFamily, encoder, config, state)
