"""The stored vectors of a teacher: of images and texts, in its joint space."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastvlp.data.records.transform import Transform
from fastvlp.data.state_store import StatesConfig, StateStore
from fastvlp.data.stored_images import ImageStore
from fastvlp.data.stored_texts import TextStore
from fastvlp.data.teacher import TeacherStore
from fastvlp.dist import Precision
from fastvlp.errors import UserError
from fastvlp.model.frozen_states import fingerprint
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import load_model


def teacher_store(folder: str, config: StatesConfig, *, precision: Precision, device: torch.device) -> TeacherStore:
    """Returns the store of the vectors of a saved run, an export or a converted model.

    Raises UserError if there is no such model, or if it has no joint space or reads boxes.
    """
    saved, run = load_model(folder), read_saved_run(folder)
    embed = saved.model.config.embed
    if embed is None:
        raise UserError(
            f"{folder}: a teacher needs a joint space of images and texts (`model.embed`), and this model has none"
        )
    if embed.reads_boxes:
        raise UserError(f"{folder}: a teacher must read whole images, and this model reads a detector's boxes")
    model = saved.model.to(device).eval()
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    @torch.no_grad()
    def encode_images(pixels: Tensor) -> Tensor:
        with bf16:
            return model.embed_image(model.encode_image(pixels.to(device)))[:, None].float().cpu()

    @torch.no_grad()
    def encode_texts(ids_BL: Tensor, length_B: Tensor) -> list[Tensor]:
        with bf16:
            return [*model.embed_text(ids_BL.to(device), length_B.to(device))[:, None].float().cpu()]

    about = {"encoder": fingerprint(saved.model.config, saved.model), "precision": precision, "states": "vectors"}
    always = replace(config, store="always")
    stores = [
        StateStore(what=what, about=about, width=embed.width, config=always)
        for what in ("teacher images", "teacher texts")
    ]
    return TeacherStore(
        images=ImageStore(store=stores[0], encode=encode_images, states=1),
        texts=TextStore(store=stores[1], encode=encode_texts, states=lambda ids_BL, _: [1] * len(ids_BL)),
        transform=Transform(size=saved.model.config.image.size, mode=run.data.fit),
        tokenizer=saved.tokenizer,
        max_length=min(run.data.max_length, saved.model.config.longest_text),
        trained_s=saved.info.get("elapsed_s"),
    )
