"""Does each optimisation leave the losses of a run as they are? Each is compared with the plain way to compute the same thing.

    python bench/same_losses_options.py                                    # 200 steps of each run, two minutes on one core
    python bench/same_losses_options.py --precision bf16
    python bench/same_losses_options.py --device cuda --compile            # on a CPU compiling takes minutes

A run of FLM and one of CLIP train on scenes of the embedded corpus, from the same weights and on the same rows. Then each of
them trains again with one thing done another way. Printed are the first step whose loss differs, the largest and the median
relative difference, and the same for `again`, the run itself a second time: what the device does not repeat. Where sums are
taken in another order, rounding grows with the steps, as it does after a change of each weight by one unit in its last place.
Muon is another optimiser, with other losses. Rows are appended to bench/results/same_losses_options.jsonl.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvlp.data.pairs import PairMaker
from fastvlp.model import like_lengths
from fastvlp.objectives import flm, losses, tiled
from fastvlp.recipes import recipe
from fastvlp.speed.made_data import with_made_data
from fastvlp.speed.measure import prepared
from fastvlp.training.loop import start, steps
from fastvlp.training.state import TrainState
from fastvlp.training.train_config import TrainConfig

Run = Literal["flm_demo", "flip_demo"]


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tuple[Run, ...] = ("flm_demo", "flip_demo")
    """Runs that train with each option."""
    ways: tuple[str, ...] = ()
    """Options to compare with each run, such as recompute; by default all."""
    steps: int = 200
    """Steps of each."""
    batch: int = 8
    """Pairs of a step."""
    image: int = 16
    """Side of the images in pixels."""
    layers: int = 1
    """Layers of the image encoder."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the matrix products."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    compile: bool = False
    """Compare compiled layers too."""
    threads: int = 1
    """CPU threads."""
    out: Path = RESULTS / "same_losses_options.jsonl"
    """File that rows are appended to."""


@dataclass(frozen=True)
class Way:
    """Another way to train a run.

    Attributes:
        changes: of the run's fields.
        around: context in which it trains.
        begin: changes the state before the first step.
    """

    changes: Mapping[str, Any] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    begin: Callable[[TrainState], None] | None = None


def plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="none")


def in_chunks() -> AbstractContextManager[Any]:
    """The vocabulary's cross-entropy a few targets at a time, which are computed again in the backward pass."""
    return mock.patch.object(losses, "token_loss", partial(losses.token_loss, whole_logits=1 << 12))


def in_tiles(batch: int) -> AbstractContextManager[Any]:
    """Contrastive losses two rows at a time."""
    return mock.patch.multiple(tiled, WHOLE_LOGITS=2 * batch, WHOLE_LOGITS_CPU=2 * batch)


@contextmanager
def padded_to(length: int) -> Iterator[None]:
    """Texts as long as the longest that there may be, in place of the batch's longest."""
    made = PairMaker.__call__

    def wide(self: PairMaker, rows: Any) -> Any:
        batch, dropped = made(self, rows)
        more = length - batch.ids.shape[1]
        return replace(batch, ids=F.pad(batch.ids, (0, more), value=self.tokenizer.pad)), dropped

    with mock.patch.object(PairMaker, "__call__", wide):
        yield


def plain_optimiser(state: TrainState) -> None:
    for group in state.optimiser.param_groups:
        group["fused"] = False


def one_rounding(state: TrainState) -> None:
    with torch.no_grad():
        for parameter in state.pretraining.parameters():
            parameter.copy_(torch.nextafter(parameter, parameter + 1))


def ways(o: Options, run: TrainConfig) -> dict[str, Way]:
    """By what is compared with the run, in which all options are as by default."""
    data = run.data
    words = run.model.fusion is not None
    own: dict[str, Way] = {
        "again": Way(),
        **({"compile": Way({"compile": True})} if o.compile else {}),
        "weights one rounding apart": Way(begin=one_rounding),
        "recompute": Way({"recompute": True}),
        "AdamW that is not fused": Way(begin=plain_optimiser),
        "two loader processes": Way({"data": replace(data, workers=2)}),
        "all texts padded to one length": Way(around=lambda: padded_to(data.max_length)),
    }
    if words:
        own |= {
            "cross-entropy by PyTorch": Way(
                around=lambda: mock.patch.object(losses, "token_loss", plain_cross_entropy)
            ),
            "cross-entropy in chunks": Way(around=in_chunks),
            "queries of padding computed": Way(around=lambda: mock.patch.object(flm, "MOST_REAL", 0.0)),
            "two micro-batches": Way({"accumulate": 2, "data": replace(data, batch_size=o.batch // 2)}),
        }
    else:
        own |= {
            "contrastive loss in tiles": Way(around=lambda: in_tiles(o.batch)),
            "gradient cache, two micro-batches": Way({"accumulate": 2, "data": replace(data, batch_size=o.batch // 2)}),
            "texts in groups of like length": Way(
                {"group_texts": True}, around=lambda: mock.patch.multiple(like_lengths, ROWS=4, GPU_ROWS=4)
            ),
        }
    return {name: way for name, way in own.items() if not o.ways or name in o.ways}


def trained(run: TrainConfig, way: Way) -> list[float]:
    """The loss of each step."""
    with way.around():
        state = start(replace(run, **(way.changes or {})))
        if way.begin is not None:
            way.begin(state)
        running = steps(state)
        found = [report.losses["loss"] for report in running]
        running.close()
    return found


def compared(name: str, base: list[float], other: list[float]) -> dict[str, Any]:
    differences = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(base, other, strict=True)]
    first = next((step for step, difference in enumerate(differences, 1) if difference), None)
    return {
        "arm": name,
        "first_difference": first,
        "largest": max(differences),
        "median": statistics.median(differences),
        "last_loss": other[-1],
    }


def runs(o: Options, folder: Path) -> dict[str, TrainConfig]:
    """On made data, of exactly so many steps."""
    small = {
        name: replace(
            (run := recipe(name)),
            data=replace(run.data, batch_size=o.batch),
            model=replace(run.model, image=replace(run.model.image, size=o.image, depth=o.layers)),
            precision=o.precision,
            device=o.device,
            threads=o.threads,
            vocab=300,
        )
        for name in o.runs
    }
    made = with_made_data(small, folder, 8)
    return {name: replace(run, steps=o.steps) for name, run in prepared(made, folder, False, 1, o.steps).items()}


def main(o: Options) -> None:
    torch.set_num_threads(o.threads)
    common = stamp(o.device, "same_losses_options.py")
    common |= {name: value for name, value in asdict(o).items() if name not in ("runs", "ways", "out")}
    table = Table(title=f"{o.steps} steps, {o.device}, {o.precision}")
    for title in ("run", "compared with it", "first difference", "largest", "median"):
        table.add_column(title, justify="left" if title in ("run", "compared with it") else "right")
    with tempfile.TemporaryDirectory() as folder:
        for name, run in runs(o, Path(folder)).items():
            base = trained(run, Way())
            for arm, way in ways(o, run).items():
                row = compared(arm, base, trained(run, way))
                # A way that fails must not take those before it along.
                append(o.out, [common | {"run": name} | row])
                equal = row["first_difference"] is None
                cells = (
                    ("none", "0", "0")
                    if equal
                    else (f"step {row['first_difference']}", f"{row['largest']:.1e}", f"{row['median']:.1e}")
                )
                table.add_row(name, arm, *cells)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
