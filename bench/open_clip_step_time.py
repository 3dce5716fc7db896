"""A step of the same CLIP towers here and in open_clip, on one device. open_clip needs torchvision; without them its arms are
left out by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from interleaved_steps import Options, Row, in_turn, made_batch, made_training, medians, ratio, shaped, show, step
from rich.console import Console
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.model.model import ModelConfig
from fastvlp.model.sizes import clip_b16, clip_b32, clip_l14, clip_small
from fastvlp.objectives.objective import combine
from fastvlp.training.speed import step_flops

SIZES = {"small": clip_small, "b32": clip_b32, "b16": clip_b16, "l14": clip_l14}


@dataclass(frozen=True, kw_only=True)
class OpenCLIPStep(Options):
    """Steps of the same CLIP towers here and in open_clip, which pads texts to `length`. Here: padded alike, and trimmed to the
    longest, as training does."""

    size: Literal["small", "b32", "b16", "l14"] = "small"
    layers: int | None = None
    vocab: int = 8000
    batch: int = 64
    length: int = 77
    keep: tuple[float, ...] = (1.0, 0.5)
    repetitions: int = 10


class OpenCLIP:
    """open_clip's model of this shape and its loss. Raises ImportError where it cannot be imported."""

    def __init__(self, o: OpenCLIPStep, config: ModelConfig, parameters: int):
        import open_clip
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
        from open_clip.transformer import PatchDropout

        image, text, embed = config.image, config.text, config.embed
        assert embed is not None
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
        self.model = CLIP(embed.width, vision, words, quick_gelu=quick).to(o.device).train()
        self.score, self.drop, self.version = ClipLoss(), PatchDropout, open_clip.__version__
        if (theirs := sum(p.numel() for p in self.model.parameters())) != parameters:
            raise SystemExit(f"{parameters} parameters here and {theirs} in open_clip: steps are not comparable")

    def loss(self, image: Tensor, ids: Tensor, keep: float) -> Tensor:
        self.model.visual.patch_dropout = self.drop(1 - keep) if keep < 1 else nn.Identity()
        return self.score(*self.model(image, ids)[:3])


def open_clip_step(o: OpenCLIPStep) -> list[Row]:
    config = shaped(SIZES[o.size](), o.vocab, o.layers)
    config = replace(config, text=replace(config.text, positions=o.length))
    training, optimiser = made_training(o, config)
    optimisers = {"padded": optimiser, "trimmed": optimiser}
    rival = None
    try:
        rival = OpenCLIP(o, config, sum(p.numel() for p in training.parameters()))
        optimisers["open_clip"] = torch.optim.AdamW(rival.model.parameters(), lr=1e-5, fused=True)
    except ImportError as error:
        Console().print(f"open_clip is absent and its arms are left out: {error}", highlight=False)

    def loss_of(arm: str, keep: float, batch: Batch) -> Callable[[], Tensor]:
        if arm == "open_clip":
            assert rival is not None
            # Made before the clock runs: its loader gives floats, ours bytes that the step normalises.
            image = (batch.image / 255 - training.model.image.mean) / training.model.image.std
            return lambda: rival.loss(image, batch.ids, keep)
        training.keep = keep
        return lambda: combine(training(batch))

    def run(number: int, name: str) -> Row:
        arm, _, keep = name.partition(" keep ")
        batch = made_batch(o, config, o.batch, number, None if arm == "trimmed" else o.length)
        taken = step(o, loss_of(arm, float(keep), batch), optimisers[arm])
        return taken | {"flops": step_flops(training, [(o.batch, batch.ids.shape[1])], {}).training}

    told = in_turn([f"{arm} keep {keep}" for keep in o.keep for arm in optimisers], o.repetitions, run)
    rows = []
    for name, taken in told.items():
        theirs = told.get(f"open_clip keep {name.split()[-1]}")
        row: dict[str, Any] = {"arm": name, "open_clip": rival.version if rival else None} | medians(taken)
        row |= {"times_as_fast": ratio(theirs, taken, "step_s") if theirs else None}
        rows.append(row | {"pairs_per_s": o.batch / row["step_s"]})
    columns = {
        "step s": ("step_s", ".3f"),
        "pairs/s": ("pairs_per_s", ",.1f"),
        "times as fast": ("times_as_fast", ".2f"),
    }
    show(f"CLIP {o.size}, batch {o.batch}, {o.device}", rows, columns)
    return rows
