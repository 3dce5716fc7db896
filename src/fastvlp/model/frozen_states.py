"""The stored states of a model's frozen encoders, and the names of their files."""

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
from fastvlp.data.stored_texts import TextStore
from fastvlp.data.stores import Stored
from fastvlp.dist import Precision
from fastvlp.model.freezing import evaluation_mode
from fastvlp.model.model import VLModel
from fastvlp.model.saved_run import SavedRun
from fastvlp.model.saving import Saved

# What is read of an image: its vector in the joint space alone, the states of the encoder, or its pixels.
ImageUse = Literal["embedding", "states", "pixels"]
# What is read of a text: its vector in the joint space alone, or its words.
TextUse = Literal["embedding", "words"]


def fingerprint(config: Any, encoder: nn.Module) -> str:
    """A hash of an encoder's config and weights."""
    digest = hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def image_store(
    model: VLModel,
    config: StatesConfig,
    *,
    precision: Precision,
    use: ImageUse = "states",
    reads: float | None = None,
    flip: float = 0.0,
) -> ImageStore:
    """Returns the store of image states from the model's image encoder, computed in this precision; where training mirrors a
    share of them (`flip`), the states of the mirrored images too.

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
    return ImageStore(store=store, encode=encode, states=states, flip=flip)


def text_store(model: VLModel, config: StatesConfig, *, precision: Precision, reads: float | None = None) -> TextStore:
    """Where the states of texts are that the head of the joint space reads; as few of them as it makes the same vector of."""
    embed, text = model.embed.config, model.config.text
    head = model.embed.text if model.embed.text.condenses else None

    def real(ids_BL: Tensor, length_B: Tensor) -> list[int]:
        if head is not None:
            return [1 if head.pool != "patches" else 2] * len(ids_BL)
        # Where padding is seen, its states are read too.
        words = model.embed.words(ids_BL, length_B, text)[1].tolist()
        return [embed.text_length or length for length in words]

    @torch.no_grad()
    def encode(ids_BL: Tensor, length_B: Tensor) -> list[Tensor]:
        device = model.text.word_table.device
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with evaluation_mode(model.text), bf16:
            state_BLD, words_B = model.text_states(ids_BL.to(device), length_B.to(device))
        states = (state_BLD.float() if head is None else head.condensed(state_BLD.float(), words_B)).cpu()
        return [own[:n] for own, n in zip(states, real(ids_BL, length_B), strict=True)]

    reading = {
        name: to_json(getattr(embed, name)) for name in ("text_mask", "text_special", "text_start", "text_length")
    }
    about = {
        "encoder": fingerprint(text, model.text),
        "precision": precision,
        "reading": {**reading, "text_pad": embed.text_pad},
        "states": "all" if head is None else head.pool,
    }
    store = StateStore(what="texts", about=about, width=text.width, config=config, reads=reads)
    return TextStore(store=store, encode=encode, states=real)


def frozen_encoders(model: VLModel) -> list[str]:
    """The encoders that learn nothing, by the name of their part; saved with the weights under `frozen`."""
    return [name for name in model.encoders() if model.is_frozen(name)]


def states_config(saved: Saved, run: SavedRun) -> StatesConfig | None:
    """Returns how the states of a run's image encoder are stored; None if the encoder was trained, or if the run stored
    none."""
    frozen = "image" in saved.info.get("frozen", [])
    return run.states if frozen and run.states.store != "never" else None


def stored_of_run(saved: Saved, run: SavedRun, use: ImageUse) -> Stored | None:
    """Returns the stores of the states of a run's encoders, which evaluations read as training did."""
    config = states_config(saved, run)
    if config is None or use == "pixels":
        return None
    return Stored(images=image_store(saved.model, config, precision=run.precision, use=use))
