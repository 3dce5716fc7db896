"""The training step of other libraries at the sizes of a recipe: CLIP's loss over the same two encoders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.dist import Precision
from fastvlp.errors import UserError
from fastvlp.exporters.public_pair import public_settings
from fastvlp.model.encoders.transformers_models import build_model, quiet_transformers
from fastvlp.model.model import ModelConfig
from fastvlp.speed.clock import Clock
from fastvlp.speed.memory import batch_bytes, held_bytes, peak_of_step
from fastvlp.speed.trial import Step, Trial
from fastvlp.training.flops import Flops

PeerName = Literal["transformers", "open_clip"]


class Peer:
    """Steps of another library's model on the batches of a trial, with the same AdamW and the same number type. Images are
    normalised before the clock starts.

    Args:
        loss: of images, normalised [B 3 H W], ids [B L] and lengths [B].
    """

    def __init__(self, trial: Trial, model: nn.Module, loss: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.device = trial.state.device
        self.precision: Precision = trial.state.precision
        self.model, self.loss = model.to(self.device).train(), loss
        groups = trial.state.optimiser.param_groups
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=groups[0]["lr"], fused=True)
        mean, std = trial.state.model.image.mean, trial.state.model.image.std
        self.inputs = [
            ((batch.image / 255 - mean) / std, batch.ids, batch.length)
            for batch in (one.to(self.device) for one in trial.loading.made)
        ]
        self.numbers = itertools.cycle(range(len(self.inputs)))
        self.flops: dict[int, float] = {}
        for _ in range(2 * len(self.inputs)):
            self.step()

    def step(self) -> Step:
        number = next(self.numbers)
        image, ids, length = self.inputs[number]
        clock = Clock(self.device)
        if number in self.flops:
            loss = self._step(image, ids, length)
        else:
            with Flops() as counted:
                loss = self._step(image, ids, length)
            self.flops[number] = counted.total
        return Step(clock.read(), len(image), 0, self.flops[number], loss)

    def _step(self, image: Tensor, ids: Tensor, length: Tensor) -> float:
        half = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            loss = self.loss(image, ids, length)
        loss.backward()
        value = loss.item()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return value

    def bytes(self) -> int:
        with peak_of_step(self.device) as peak:
            self.step()
            extra = peak()
        return held_bytes(self.optimiser, self.model) + max(map(batch_bytes, self.inputs)) + extra


def transformers_step(trial: Trial) -> Peer:
    """The model of transformers that this one would be exported to, on whole images; texts are trimmed to the batch's
    longest, as here."""
    settings = two_towers(trial)
    with quiet_transformers():
        model = build_model(settings)

    def loss(image: Tensor, ids: Tensor, length: Tensor) -> Tensor:
        seen = (torch.arange(ids.shape[1], device=ids.device) < length[:, None]).long()
        return model(input_ids=ids, pixel_values=image, attention_mask=seen, return_loss=True).loss

    return Peer(trial, model, loss)


def open_clip_step(trial: Trial) -> Peer:
    """open_clip's model of the same shape. It pads texts to the model's positions, and drops patches as the recipe does."""
    two_towers(trial)
    try:
        model, clip_loss, drop = open_clip_model(trial.state.model.config)
    except ImportError as error:
        raise UserError(
            f"open_clip cannot be imported ({error}); install it with torchvision, or leave it out"
        ) from error
    keep, config = trial.run.keep, trial.state.model.config
    model.visual.patch_dropout = drop(1 - keep) if keep < 1 else nn.Identity()

    def loss(image: Tensor, ids: Tensor, length: Tensor) -> Tensor:
        padded = F.pad(ids, (0, config.text.positions - ids.shape[1]), value=config.text.pad)
        return clip_loss(*model(image, padded)[:3])

    return Peer(trial, model, loss)


PEERS: Mapping[PeerName, Callable[[Trial], Peer]] = {"transformers": transformers_step, "open_clip": open_clip_step}


def two_towers(trial: Trial) -> dict[str, Any]:
    """The config of the same encoders in transformers. Raises UserError for a model that other libraries do not have."""
    settings = public_settings(trial.state.model.config)
    if settings is None:
        raise UserError(
            f"{trial.run.name}: `beside` needs two encoders with a joint space in a public shape, CLIP's, SigLIP's or "
            f"Chinese CLIP's, such as those of clip_photos; leave it out"
        )
    if trial.run.accumulate > 1:
        raise UserError(f"{trial.run.name}: `beside` needs steps of one micro-batch; set accumulate=1")
    return settings


def open_clip_model(config: ModelConfig) -> tuple[Any, Callable[..., Tensor], Any]:
    """open_clip's model with the shape of `config`, its loss, and its module that drops patches.

    Raises ImportError if open_clip cannot be imported."""
    import open_clip  # noqa: F401
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from open_clip.transformer import PatchDropout

    image: Any = config.image
    text: Any = config.text
    assert config.embed is not None
    vision = CLIPVisionCfg(
        layers=image.depth,
        width=image.layer.width,
        head_width=image.layer.width // image.layer.heads,
        patch_size=image.patch,
        image_size=image.size,
    )
    words = CLIPTextCfg(
        context_length=text.positions,
        vocab_size=text.vocab,
        width=text.layer.width,
        heads=text.layer.heads,
        layers=text.depth,
    )
    quick = image.layer.activation == "quick_gelu"
    return CLIP(config.embed.width, vision, words, quick_gelu=quick), ClipLoss(), PatchDropout
