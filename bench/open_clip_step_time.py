"""Time a training step of the same CLIP towers in this library and in open_clip, on one device.

Run as `python bench/contrastive_time_and_memory.py open-clip`. open_clip needs torchvision; where it cannot be imported, its
arms are left out and a message says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from interleaved_steps import (
    Options,
    Row,
    build_training,
    in_turn,
    medians,
    random_batch,
    ratio,
    show,
    step,
    with_vocabulary_and_layers,
)
from rich.console import Console
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.model.model import ModelConfig
from fastvlp.model.sizes import clip_b16, clip_b32, clip_l14, clip_small
from fastvlp.objectives.objective import combine
from fastvlp.speed.peers import open_clip_model
from fastvlp.training.flops import gradient_flops

SIZES = {"small": clip_small, "b32": clip_b32, "b16": clip_b16, "l14": clip_l14}


@dataclass(frozen=True, kw_only=True)
class OpenCLIPStep(Options):
    """Time steps of the same CLIP towers here and in open_clip, which pads texts to `length`. Here texts are padded alike in
    one arm, and trimmed to the batch's longest in another, as in training."""

    size: Literal["small", "b32", "b16", "l14"] = "small"
    """Size of the towers."""
    layers: int | None = None
    """Layers of each tower, instead of all."""
    vocab: int = 8000
    """Tokens in the vocabulary."""
    batch: int = 64
    """Pairs in a step."""
    length: int = 77
    """Tokens of a padded text."""
    keep: tuple[float, ...] = (1.0, 0.5)
    """Shares of the patches."""
    repetitions: int = 10
    """Timed steps of each arm."""


class OpenCLIP:
    """open_clip's model with the shape of `config`, and its loss.

    Raises ImportError where open_clip cannot be imported, and SystemExit where its number of parameters differs."""

    def __init__(self, o: OpenCLIPStep, config: ModelConfig, parameters: int):
        import open_clip

        model, self.score, self.drop = open_clip_model(config)
        self.model, self.version = model.to(o.device).train(), open_clip.__version__
        if (theirs := sum(p.numel() for p in self.model.parameters())) != parameters:
            raise SystemExit(f"{parameters} parameters here and {theirs} in open_clip: steps are not comparable")

    def loss(self, image: Tensor, ids: Tensor, keep: float) -> Tensor:
        self.model.visual.patch_dropout = self.drop(1 - keep) if keep < 1 else nn.Identity()
        return self.score(*self.model(image, ids)[:3])


def open_clip_step(o: OpenCLIPStep) -> list[Row]:
    config = with_vocabulary_and_layers(SIZES[o.size](), o.vocab, o.layers)
    config = replace(config, text=replace(config.text, positions=o.length))
    training, optimiser = build_training(o, config)
    optimisers = {"padded": optimiser, "trimmed": optimiser}
    other = None
    try:
        other = OpenCLIP(o, config, sum(p.numel() for p in training.parameters()))
        optimisers["open_clip"] = torch.optim.AdamW(other.model.parameters(), lr=1e-5, fused=True)
    except ImportError as error:
        Console().print(f"open_clip is absent and its arms are left out: {error}", highlight=False)

    def loss_of(arm: str, keep: float, batch: Batch) -> Callable[[], Tensor]:
        if arm == "open_clip":
            assert other is not None
            # Computed before the clock starts: open_clip's loader gives floats, ours bytes that the step normalises.
            image = (batch.image / 255 - training.model.image.mean) / training.model.image.std
            return lambda: other.loss(image, batch.ids, keep)
        training.keep = keep
        return lambda: combine(training(batch))

    counted: dict[tuple[float, int, int], int] = {}

    def run(number: int, name: str) -> Row:
        arm, _, keep = name.partition(" keep ")
        batch = random_batch(o, config, o.batch, number, None if arm == "trimmed" else o.length)
        seconds = step(o, loss_of(arm, float(keep), batch), optimisers[arm])
        shape = (training.keep, *batch.ids.shape)
        if shape not in counted:
            counted[shape] = gradient_flops(training, lambda: combine(training(batch)))
        return seconds | {"flops": counted[shape]}

    results = in_turn([f"{arm} keep {keep}" for keep in o.keep for arm in optimisers], o.repetitions, run)
    rows = []
    for name, steps in results.items():
        theirs = results.get(f"open_clip keep {name.split()[-1]}")
        row: dict[str, Any] = {"arm": name, "open_clip": other.version if other else None} | medians(steps)
        row |= {"times_as_fast": ratio(theirs, steps, "step_s") if theirs else None}
        rows.append(row | {"pairs_per_s": o.batch / row["step_s"]})
    columns = {
        "step s": ("step_s", ".3f"),
        "pairs/s": ("pairs_per_s", ",.1f"),
        "times as fast": ("times_as_fast", ".2f"),
    }
    show(f"CLIP {o.size}, batch {o.batch}, {o.device}", rows, columns)
    return rows
