"""What is stored of a model's frozen encoders, and under which name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastvlp.config import to_json
from fastvlp.data.state_store import StatesConfig, StateStore
from fastvlp.data.stored_images import ImageStore
from fastvlp.dist import Precision
from fastvlp.model.freezing import evaluation_mode
from fastvlp.model.model import VLModel

# What is read of an image: its vector in the joint space alone, the states of the encoder, or its pixels.
ImageUse = Literal["embedding", "states", "pixels"]


def fingerprint(config: Any, encoder: nn.Module) -> str:
    """A hash of an encoder's config and weights."""
    digest = hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def image_store(
    model: VLModel, config: StatesConfig, *, precision: Precision, use: ImageUse = "states", reads: float | None = None
) -> ImageStore:
    """Where the states of images by the model's image encoder are, computed in this precision.

    Where their vectors in the joint space alone are read, fewer states are stored, if the head makes the same of them: their
    mean in place of a whole map takes a fiftieth of the space.
    """
    image = model.config.image
    head = model.embed.image if use == "embedding" and model.embed.image.condenses else None
    states = image.tokens if head is None else head.condensed(torch.zeros(1, image.tokens, image.width)).shape[1]

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        device = next(model.image.parameters()).device
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with evaluation_mode(model.image), bf16:
            state_BSD = model.image(pixels.to(device)).float()
        return (state_BSD if head is None else head.condensed(state_BSD)).cpu()

    about: Mapping[str, Any] = {
        "encoder": fingerprint(image, model.image),
        "precision": precision,
        "states": "all" if head is None else head.pool,
    }
    store = StateStore(what="images", about=about, width=image.width, config=config, reads=reads)
    return ImageStore(store=store, encode=encode, states=states)
