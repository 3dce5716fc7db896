"""Time training steps and the loader of this checkout beside those of an earlier commit, in turns.

    python bench/beside_commit.py --commit f2a0dd9 --rounds 96 --sets 4
    python bench/beside_commit.py --commit f2a0dd9 --sizes small --objectives clip --what step --steps 1 --rounds 30

One process loads the package three times and takes turns, `steps` steps each: the earlier commit, this checkout, and this
checkout again, whose ratio to the second is the noise; on a busy machine that is half of what processes of their own have.
Measured is CPU time. Batches are made within the turns, by no thread of their own. Where objects lie in memory matters by a
per cent or so as long as they live: `sets` of three follow each other. `step`: the training loop, with its loader and without
validation; images are cached, as by default. `loader`: batches without a model, images decoded each time (`--cache`: read from
the cache). `epoch`: the first epoch of a loader, in which each turn decodes all images into the cache, and hashes them where an
objective contrasts rows. Prints, for each case, the median of the ratios within turns, with its standard error, from the
spread of the ratios or of the medians of the sets, whichever is larger.
"""

from __future__ import annotations

import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, Literal

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import tyro
from PIL import Image
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
# Of made pictures, and of the squares that the two models read.
SIDES = {"tiny": (64, 48), "small": (320, 112)}
Objective = Literal["mlm", "flm", "ar", "cappa", "clip"]
Size = Literal["tiny", "small"]
What = Literal["step", "loader", "epoch"]


@dataclass(frozen=True, kw_only=True)
class Options:
    commit: str = "f2a0dd9"
    """The commit to compare with."""
    objectives: tuple[Objective, ...] = ("mlm", "flm", "clip")
    """Objectives that are trained."""
    sizes: tuple[Size, ...] = ("tiny",)
    """Sizes of the model: `tiny` with pictures of 64 pixels, `small` with pictures of 320."""
    what: tuple[What, ...] = ("step", "loader")
    """Steps of training, the loader alone, or the loader's first epoch."""
    cache: bool = False
    """Whether the loader alone reads images from its cache."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number type of matrix products."""
    batch: int = 32
    """Rows of a batch."""
    records: int = 512
    """Records of the data."""
    steps: int = 20
    """Steps of a turn."""
    rounds: int = 60
    """Turns of each, in all sets together."""
    sets: int = 1
    """Times that the package is loaded, and the run begun, anew."""
    out: Path = RESULTS / "beside_commit.jsonl"
    """File that rows are appended to."""


@dataclass
class Arm:
    """The package loaded from a tree: its modules, a turn and what is done before it, and the CPU seconds of its turns."""

    tree: Path
    modules: dict[str, ModuleType] = field(default_factory=dict)
    parameters: int = 0
    prepare: Callable[[], None] = lambda: None
    turn: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)

    def timed_turn(self) -> None:
        with self.loaded():
            self.prepare()
            began = time.process_time()
            self.turn()
            self.seconds.append(time.process_time() - began)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """While it lasts, `fastvlp` is that of the tree."""
        sys.modules |= self.modules
        sys.path.insert(0, str(self.tree / "src"))
        try:
            yield
        finally:
            sys.path.pop(0)
            self.modules = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "fastvlp"}


def made_records(count: int, side: int) -> Iterator[tuple[str, bytes, list[str]]]:
    """Key, JPEG and captions of each: blurred noise, and 4 to 20 words of 400."""
    for i in range(count):
        random, pixels = Random(i), np.random.default_rng(i).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        captions = [" ".join(f"word{random.randrange(400)}" for _ in range(random.randint(4, 20))) for _ in range(2)]
        yield f"{i:06d}", file.getvalue(), captions


def write_data(folder: Path, o: Options, size: Size) -> None:
    from fastvlp.batch import Record
    from fastvlp.data.records.shards import ShardWriter

    with ShardWriter(folder / "train") as writer:
        for key, image, captions in made_records(o.records, SIDES[size][0]):
            writer.write(Record(key=key, images=(image,), info={"captions": captions}))


def measured_run(folder: Path, objective: Objective, size: Size, batch: int, cache: bool, precision: str) -> Any:
    """A recipe of the package on the made data. `clip`: the two encoders of the recipe of MLM."""
    from fastvlp.model.sizes import two_towers
    from fastvlp.objectives.clip import CLIPConfig

    # An earlier commit may lack the recipes of the others.
    name = f"{'mlm' if objective == 'clip' else objective}_{'demo' if size == 'tiny' else 'photos'}"
    run = getattr(import_module(f"fastvlp.recipes.{name}"), name)()
    if objective == "clip":
        run = replace(run, model=two_towers(run.model), objectives={"clip": CLIPConfig()})
    data = replace(run.data, train=str(folder / "train"), val=None, batch_size=batch, cache=cache, workers=0)
    run = replace(run, data=data, steps=1 << 40, budget_s=None, validate_every=None, checkpoint_every=None, keep=1.0)
    return replace(run, out=str(folder / "run"), precision=precision, threads=1, vocab=500)


def start_arm(tree: Path, folder: Path, o: Options, objective: Objective, size: Size, what: What) -> Arm:
    """Loads the package from a tree, begins a run, and warms it up."""
    arm, cache = Arm(tree), o.cache or what != "loader"
    # Each has its own data, since the indexes that they write beside them may differ.
    place = Path(tempfile.mkdtemp(dir=folder))
    with arm.loaded():
        import fastvlp.data.loader
        from fastvlp.training.loop import start

        if Path(fastvlp.data.loader.__file__).is_relative_to(tree) is False:
            raise SystemExit(f"{fastvlp.data.loader.__file__} is not in {tree}")
        # Batches are made where they are used, and not by a thread in the turns of others.
        fastvlp.data.loader.Prefetch = iter
        write_data(place, o, size)
        state = start(measured_run(place, objective, size, o.batch, cache, o.precision))
        arm.parameters = sum(p.numel() for p in state.pretraining.parameters())
        arm.prepare, arm.turn = first_epochs(state) if what == "epoch" else endless(state, what, o.steps, cache)
    return arm


def endless(state: Any, what: What, steps: int, cache: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """Turns of an endless run, which has begun: the steps after its first epoch where images are cached."""
    from fastvlp.training.loop import steps as training_steps

    running: Iterator[Any] = training_steps(state) if what == "step" else state.train.batches()

    def turn(count: int = steps) -> None:
        for _ in range(count):
            next(running)

    turn(3 + (state.train.count // state.train.batch_size if cache else 0))
    return lambda: None, turn


def first_epochs(state: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Turns of every record once, each by a loader that knows none of them; a pickled copy of its parts begins anew."""
    loader = copy(state.train)

    def prepare() -> None:
        loader.make = pickle.loads(pickle.dumps(state.train.make))

    def turn() -> None:
        for _ in loader.once():
            pass

    return prepare, turn


def compared(over: Sequence[Arm], under: Sequence[Arm]) -> tuple[float, float]:
    """The median of the ratios within turns, and its standard error: of a median, from the median deviation of the ratios, or
    from the spread of the medians of the sets."""
    sets = [np.array(a.seconds) / np.array(b.seconds) for a, b in zip(over, under)]
    ratios = np.concatenate(sets)
    middle = float(np.median(ratios))
    spread = 1.4826 * float(np.median(abs(ratios - middle)))
    error = 1.2533 * spread / len(ratios) ** 0.5
    if len(sets) > 1:
        error = max(error, float(np.std([np.median(part) for part in sets], ddof=1)) / len(sets) ** 0.5)
    return middle, error


def measured_arms(o: Options, trees: Sequence[Path], *case: Any) -> list[Arm]:
    """The arms of a set, after their turns."""
    with tempfile.TemporaryDirectory() as folder:
        arms = [start_arm(tree, Path(folder), o, *case) for tree in trees]
        if len({arm.parameters for arm in arms}) > 1:
            counts = ", ".join(str(arm.parameters) for arm in arms)
            raise SystemExit(f"{' '.join(case)}: the models differ ({counts})")
        gc.collect()
        gc.freeze()
        # In every order equally often: what runs before an arm matters on a shared core.
        orders = itertools.cycle(itertools.permutations(arms))
        for order in itertools.islice(orders, o.rounds // o.sets):
            for arm in order:
                arm.timed_turn()
    return arms


def measure(o: Options, tree: Path, objective: Objective, size: Size, what: What) -> dict[str, Any]:
    steps = o.records // o.batch if what == "epoch" else o.steps
    trees = (tree, ROOT, ROOT)
    before, now, again = zip(*(measured_arms(o, trees, objective, size, what) for _ in range(o.sets)))
    (ratio, error), (control, control_error) = compared(now, before), compared(again, now)
    return {
        "what": what,
        "objective": objective,
        "size": size,
        "cache": o.cache or what != "loader",
        "precision": o.precision,
        "batch": o.batch,
        "ratio": ratio,
        "error": error,
        "again": control,
        "again_error": control_error,
        "step_ms": 1e3 * float(np.median([second for arm in now for second in arm.seconds])) / steps,
        "rounds": o.rounds,
        "sets": o.sets,
        "steps": steps,
        "beside": o.commit,
    }


def main(o: Options) -> None:
    table = Table("what", "size", "objective", "ms a step", "now / before", "now / now")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), o.commit], check=True, capture_output=True)
        try:
            for what in o.what:
                for size in o.sizes:
                    for objective in o.objectives:
                        row = measure(o, tree, objective, size, what)
                        append(o.out, [stamp("cpu", "beside_commit.py") | row])
                        cells = (
                            f"{row[a]:.3f} +- {row[b]:.3f}" for a, b in (("ratio", "error"), ("again", "again_error"))
                        )
                        table.add_row(what, size, objective, f"{row['step_ms']:.2f}", *cells)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False, capture_output=True)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
