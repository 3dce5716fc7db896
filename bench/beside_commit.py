"""Time training steps and the loader of this checkout beside those of an earlier commit, in turns.

    python bench/beside_commit.py --commit f2a0dd9 --rounds 96 --sets 4
    python bench/beside_commit.py --commit f2a0dd9 --sizes small --objectives clip --what step --steps 1 --rounds 30

Three processes take turns, `steps` steps each: the earlier commit, this checkout, and this checkout again, whose ratio to
the second is the noise. Two processes of one program may differ by some per cent as long as they live (where their memory
lies), so that `sets` of three follow each other. Measured is the CPU time of the whole process with its threads, so that other
programs matter little. `step`: the training loop, with its loader and without validation; images are cached, as by default.
`loader`: batches without a model, images decoded each time (`--cache`: read from the cache). `epoch`: the first epoch of a
loader, in which each turn decodes all images into the cache, and hashes them where an objective contrasts rows. Prints, for
each case, the median of the ratios within turns, with its standard error, from the spread of the ratios or of the
medians of the sets, whichever is larger.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
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
    """What is learned."""
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
    """Turns of each process, in all sets together."""
    sets: int = 1
    """Times that the processes are started anew."""
    out: Path = RESULTS / "beside_commit.jsonl"
    """File that rows are appended to."""


@dataclass
class Arm:
    """A process that runs steps on request, the number of parameters that it trains, and the seconds of its turns."""

    name: str
    process: subprocess.Popen[str]
    parameters: int
    seconds: list[float] = field(default_factory=list)

    def turn(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print("turn", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended")
        return float(line)


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
    from fastvlp.recipes.ar_demo import ar_demo
    from fastvlp.recipes.ar_photos import ar_photos
    from fastvlp.recipes.cappa_demo import cappa_demo
    from fastvlp.recipes.cappa_photos import cappa_photos
    from fastvlp.recipes.flm_demo import flm_demo
    from fastvlp.recipes.flm_photos import flm_photos
    from fastvlp.recipes.mlm_demo import mlm_demo
    from fastvlp.recipes.mlm_photos import mlm_photos

    recipes: dict[tuple[str, str], Callable[[], Any]] = {
        ("mlm", "tiny"): mlm_demo,
        ("flm", "tiny"): flm_demo,
        ("ar", "tiny"): ar_demo,
        ("cappa", "tiny"): cappa_demo,
        ("clip", "tiny"): mlm_demo,
        ("mlm", "small"): mlm_photos,
        ("flm", "small"): flm_photos,
        ("ar", "small"): ar_photos,
        ("cappa", "small"): cappa_photos,
        ("clip", "small"): mlm_photos,
    }
    run = recipes[objective, size]()
    if objective == "clip":
        run = replace(run, model=two_towers(run.model), objectives={"clip": CLIPConfig()})
    data = replace(run.data, train=str(folder / "train"), val=None, batch_size=batch, cache=cache, workers=0)
    run = replace(run, data=data, steps=1 << 40, budget_s=None, validate_every=None, checkpoint_every=None, keep=1.0)
    return replace(run, out=str(folder / "run"), precision=precision, threads=1, vocab=500)


def serve_turns(
    folder: str, objective: Objective, size: Size, batch: str, what: What, cache: str, precision: str, steps: str
) -> None:
    """Runs `steps` steps for each line of the input, and prints their CPU seconds."""
    from fastvlp.training.loop import start

    state = start(measured_run(Path(folder), objective, size, int(batch), cache == "True", precision))
    prepare, turn = first_epochs(state) if what == "epoch" else endless(state, what, int(steps), cache == "True")
    print(sum(p.numel() for p in state.pretraining.parameters()), flush=True)
    for _ in sys.stdin:
        prepare()
        began = time.process_time()
        turn()
        print(time.process_time() - began, flush=True)
    os._exit(0)


def endless(state: Any, what: What, steps: int, cache: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """Turns of an endless run, which has begun: the steps after its first epoch where images are cached. The loader alone
    makes its batches in the turns themselves: its thread would make the next ones between them."""
    from fastvlp.training.loop import steps as training_steps

    loader = state.train
    batches = (loader.make(loader.rows(s)) for s in itertools.count())
    running: Iterator[Any] = training_steps(state) if what == "step" else batches

    def turn(count: int = steps) -> None:
        for _ in range(count):
            next(running)

    turn(3 + (loader.count // loader.batch_size if cache else 0))
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


def start_arm(name: str, tree: Path, words: list[str]) -> Arm:
    command = [sys.executable, __file__, "turns", *words]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert process.stdout is not None
    parameters = process.stdout.readline().strip()
    if not parameters.isdecimal():
        raise SystemExit(f"{name}: {' '.join(command)} with the sources in {tree} did not start")
    return Arm(name, process, int(parameters))


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


def measured_arms(o: Options, trees: dict[str, tuple[Path, Path]], words: list[str]) -> list[Arm]:
    """The processes of a set, after their turns."""
    arms = [start_arm(name, tree, [str(place), *words]) for name, (tree, place) in trees.items()]
    if len({arm.parameters for arm in arms}) > 1:
        counts = ", ".join(str(arm.parameters) for arm in arms)
        raise SystemExit(f"{' '.join(words[:2])}: the models differ ({counts})")
    # In every order equally often: what runs before an arm matters on a shared core.
    orders = itertools.cycle(itertools.permutations(arms))
    try:
        for order in itertools.islice(orders, o.rounds // o.sets):
            for arm in order:
                arm.seconds.append(arm.turn())
    finally:
        for arm in arms:
            arm.process.kill()
            arm.process.wait()
    return arms


def measure(o: Options, tree: Path, objective: Objective, size: Size, what: What) -> dict[str, Any]:
    cache = o.cache or what != "loader"
    steps = o.records // o.batch if what == "epoch" else o.steps
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for name, sources in (("before", tree), ("now", ROOT), ("again", ROOT)):
            # Each has its own, since the indexes that they write beside the data may differ.
            place = Path(folder) / name
            write_data(place, o, size)
            trees[name] = (sources, place)
        words = [objective, size, str(o.batch), what, str(cache), o.precision, str(o.steps)]
        before, now, again = zip(*(measured_arms(o, trees, words) for _ in range(o.sets)))
    (ratio, error), (control, control_error) = compared(now, before), compared(again, now)
    return {
        "what": what,
        "objective": objective,
        "size": size,
        "cache": cache,
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
    if sys.argv[1:2] == ["turns"]:
        serve_turns(*sys.argv[2:])  # type: ignore[arg-type]
    else:
        main(tyro.cli(Options, description=__doc__))
