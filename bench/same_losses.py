"""Compare the losses of every recipe in two checkouts of this repository, bit for bit: did a refactoring change behaviour?

    git worktree add ../old COMMIT
    python bench/same_losses.py ../old . --steps 50

Each recipe runs through the command line of each checkout, on the CPU with one thread and one seed, on small data sets that
the first checkout writes: scenes of the embedded corpus, and scenes with made features of a detector. Models of published
size are made shallow, and batches small. Besides the recipes as they are there are runs with bf16, accumulation, averaged
weights, frozen parts, batches by length, two languages and validation. Compared are all losses, learning rates, gradient
norms and dropped records in `log.jsonl`. Results of the first checkout are kept in the work folder, by commit, number of
steps and options, so that a second call runs only the other one. Prints a row for each run; exits with 1 if any differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before PyTorch is imported: results do not depend on the number of cores, and no GPU is used.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch  # noqa: F401  (once, for all the commands that run in forks)
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

# Fields of a log line that depend on the clock or the machine.
UNCOMPARED = {
    "time", "elapsed", "left", "memory", "mfu", "data_wait", "pairs_per_s", "tokens_per_s", "flops_per_s", "source"
}  # fmt: skip
# Lines about steps; others say what the run started from.
COMPARED_KINDS = {"train", "validation", "dropped"}
# An option that has another name in one of the checkouts: {name here: names to try instead, in turn}.
RENAMED: dict[str, tuple[str, ...]] = {}
# Options that older checkouts lack, which make a newer one do what they do: no public weights, no stored states in fp16.
NEWER = ("--image", "None", "--text", "None", "--states.store", "never")

SMALL_BATCH = ("--data.batch-size", "8")
PHOTOS = (*SMALL_BATCH, "--vocab", "600", "--model.image.size", "64")
SHALLOW_TOWERS = ("--model.image.depth", "2", "--model.text.depth", "1")
SMALL_BRIVL = (
    *("--model", "brivl_tiny", "--vocab", "600", "--data.max-length", "64", "--data.workers", "0", *SMALL_BATCH),
    *("--data.train", "demo/world/train", "--data.val", "demo/world/val"),
    *("--train-last.image", "2", "--train-last.text", "1", "--freeze"),
)
MADE_BY = {"flip_tune": "flip_photos"}


@dataclass(frozen=True)
class Case:
    """A run: options of `vlp pretrain RECIPE` besides those of all runs. after: the run that it starts from."""

    name: str
    recipe: str
    options: tuple[str, ...] = ()
    after: str | None = None


def recipe_cases(names: Sequence[str]) -> Iterator[Case]:
    own: dict[str, tuple[str, ...]] = {
        "flm_base": (
            *("--data.train", "photos/train", "--data.val", "photos/val", "--data.batch-size", "4"),
            *("--data.workers", "1", "--no-compile", "--accumulate", "2", "--init", "None"),
            *(*SHALLOW_TOWERS, "--model.image.size", "64", "--model.fusion.depth", "1"),
            *("--model.reconstructor.bottom", "1", "--model.reconstructor.top", "1", "--tokenizer", "None"),
        ),
        "flip_l16": (
            *("--data.train", "photos/train", "--data.val", "photos/val", "--data.batch-size", "4"),
            *("--data.workers", "0", "--no-compile", "--accumulate", "2", "--tokenizer", "None"),
            *(*SHALLOW_TOWERS, "--model.image.size", "64", "--vocab", "600"),
        ),
        "uniter_base": (
            *("--data.workers", "1", "--accumulate", "2", "--init", "None", "--model.single.depth", "2"),
            *("--data.max-tokens", "512", "--data.group", "64", "--vocab", "600"),
        ),
        "brivl_base": SMALL_BRIVL,
        "brivl2_base": SMALL_BRIVL,
    }
    for name in names:
        options = own.get(name, PHOTOS if not name.endswith("_demo") else SMALL_BATCH)
        yield Case(name, name, options, MADE_BY.get(name))


def more_cases() -> Iterator[Case]:
    """Runs that take the paths which no recipe takes by itself."""
    two = ("--accumulate", "2")
    bf16 = ("--precision", "bf16")
    for recipe in ("flm_demo", "flip_demo", "brivl_demo", "uniter_demo"):
        yield Case(f"{recipe}, bf16", recipe, (*SMALL_BATCH, *bf16))
    for recipe in ("flm_demo", "mlm_demo", "uniter_demo"):
        yield Case(f"{recipe}, accumulate", recipe, (*SMALL_BATCH, *two))
    for recipe in ("clip_photos", "siglip_photos", "brivl_photos", "clip_simclr_demo"):
        options = SMALL_BATCH if recipe.endswith("demo") else PHOTOS
        yield Case(f"{recipe}, cached gradients", recipe, (*options, *two))
    yield Case("flm_demo, averaged weights", "flm_demo", (*SMALL_BATCH, "--ema", "0.9"))
    yield Case("flm_demo, by length", "flm_demo", (*SMALL_BATCH, "--data.group", "64"))
    yield Case("ar_demo, budget of tokens", "ar_demo", (*SMALL_BATCH, "--data.max-tokens", "256"))
    yield Case("flm_demo, half of the patches", "flm_demo", (*SMALL_BATCH, "--keep", "0.5"))
    yield Case("mlm_demo, frozen", "mlm_demo", (*SMALL_BATCH, "--freeze", "text.word", "image"))
    yield Case("flm_demo, two languages", "flm_demo", (*SMALL_BATCH, "--data.captions", "captions+captions_zh"))
    moco = ("--objectives.moco.mode", "batch+queue")
    yield Case("brivl_photos, batch and queue", "brivl_photos", (*PHOTOS, *moco))
    yield Case("flip_clip_flm, inherited", "flip_clip_flm", (*PHOTOS, "--from", "runs/flm_photos"), "flm_photos")


def cases(names: Sequence[str]) -> list[Case]:
    return [*recipe_cases(names), *more_cases()]


# ---- data ----


def write_data(checkout: Path, folder: Path) -> None:
    """demo/world, photos and detected, relative to `folder`."""
    scenes = ("--train", "240", "--val", "32", "--test", "8", "--pairs", "0", "--singles", "0")
    vlp(checkout, folder, "data", "demo", "--out", "demo/world", *scenes)
    vlp(checkout, folder, "data", "demo", "--out", "photos", "--seed", "1", "--size", "96", *scenes)
    write_detections(folder / "made")
    import_options = ("--features", "made/features", "--images", "blank", "--val", "0.1")
    vlp(checkout, folder, "data", "import", "made/captions.jsonl", "--out", "detected", *import_options)


def write_detections(folder: Path, images: int = 160) -> None:
    """Captions, and of each image 10 to 30 regions with random features and shares of classes, in UNITER's layout."""
    (folder / "features").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for i in range(images):
            captions = [" ".join(random.choice(words, random.integers(4, 16))) for _ in range(2)]
            file.write(json.dumps({"image": f"{i:04}.jpg", "captions": captions}) + "\n")
            R = int(random.integers(10, 31))
            x0y0 = random.uniform(0, 0.5, (R, 2))
            classes = random.exponential(size=(R, 1601))
            np.savez(
                folder / "features" / f"{i:04}.npz",
                norm_bb=np.concatenate([x0y0, x0y0 + random.uniform(0.1, 0.5, (R, 2))], axis=1).astype(np.float32),
                features=random.standard_normal((R, 2048)).clip(0).astype(np.float16),
                conf=random.uniform(0.1, 1, R).astype(np.float32),
                soft_labels=(classes / classes.sum(1, keepdims=True)).astype(np.float16),
            )


def digests(folder: Path) -> dict[str, str]:
    """The hash of each file below the folder, by its path, but for the indexes of tars, which hold the files' times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "index." not in path.name)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- runs ----


def vlp(checkout: Path, folder: Path, *words: str) -> None:
    """Runs a command of the checkout in `folder`, in a fork of this process, which has imported PyTorch but not fastvlp.

    Raises RuntimeError with the end of what it printed."""
    printed = folder / "printed.txt"
    command = multiprocessing.get_context("fork").Process(target=in_child, args=(checkout, folder, words, printed))
    command.start()
    command.join()
    if command.exitcode:
        end = printed.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"vlp {' '.join(words)}: exit status {command.exitcode}\n{end}")


def in_child(checkout: Path, folder: Path, words: Sequence[str], printed: Path) -> None:
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(checkout / "src"))
    sys.argv = ["vlp", *words]
    runpy.run_module("fastvlp", run_name="__main__")


def run_case(checkout: Path, folder: Path, case: Case, steps: int) -> list[dict[str, Any]]:
    """The lines of the run's log, less what depends on the clock."""
    out = folder / "runs" / slug(case.name)
    shutil.rmtree(out, ignore_errors=True)
    options = ["--precision", "fp32", *case.options] if "--precision" not in case.options else [*case.options]
    common = ["--steps", str(steps), "--log-every", "1", "--validate-every", str(max(1, steps // 2))]
    words = ["pretrain", case.recipe, *common, "--out", str(out.relative_to(folder)), *options]
    tried = [[*words, *NEWER], words, *renamed(words)]
    for attempt, command in enumerate(tried):
        try:
            vlp(checkout, folder, *command)
            break
        except RuntimeError:
            if attempt == len(tried) - 1:
                raise
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in UNCOMPARED} for line in lines]


def renamed(words: Sequence[str]) -> Iterator[list[str]]:
    """The command in the other checkout's words."""
    for i in range(max(map(len, RENAMED.values()), default=0)):
        yield [RENAMED[word][min(i, len(RENAMED[word]) - 1)] if word in RENAMED else word for word in words]


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def first_difference(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], within: float = 0.0) -> str | None:
    """Where two logs differ first: by more than the share `within` of the number, if it is one."""
    old, new = ([line for line in lines if line["kind"] in COMPARED_KINDS] for lines in (old, new))
    for a, b in zip(old, new):
        for name in [*a, *(b.keys() - a.keys())]:
            if relative_difference(a.get(name), b.get(name)) > within:
                return f"step {a.get('step')}, {a.get('kind')}, {name}: {a.get(name)} and {b.get(name)}"
    return None if len(old) == len(new) else f"{len(old)} and {len(new)} lines of log"


def relative_difference(a: Any, b: Any) -> float:
    """Difference of two numbers as a share of the larger one; infinite if anything else differs."""
    if a == b:
        return 0.0
    numbers = isinstance(a, float) and isinstance(b, float)
    return abs(a - b) / max(abs(a), abs(b)) if numbers else math.inf


def largest_difference(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> float:
    """The largest relative difference of the losses of all steps and validations."""
    losses = ((a[name], b.get(name)) for a, b in zip(old, new) for name in a if name == "loss" or "/" in name)
    return max((relative_difference(*pair) for pair in losses), default=0.0)


# ---- the two checkouts ----


def commit(checkout: Path) -> str:
    """The checkout's commit; with `+changes` and a hash of them where there are any."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    head, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "src")
    return head + (f"+changes-{hashlib.sha256(git('diff', 'HEAD').encode()).hexdigest()[:8]}" if changes else "")


def recipe_names(checkout: Path) -> list[str]:
    folder = checkout / "src" / "fastvlp" / "recipes"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def prepared(checkout: Path, work: Path) -> Path:
    """The folder in which runs of the checkout's commit are kept."""
    folder = work / commit(checkout)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept_or_run(checkout: Path, folder: Path, case: Case, steps: int) -> list[dict[str, Any]]:
    """The run's log; from an earlier call where it was the same run."""
    text = json.dumps([case.recipe, case.options, steps, case.after])
    path = folder / "logs" / f"{slug(case.name)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(run_case(checkout, folder, case, steps)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def main(
    old: Positional[Path],
    new: Positional[Path],
    /,
    runs: tuple[str, ...] = (),
    steps: int = 50,
    work: Path = Path("runs/same_losses"),
    within: float = 0.0,
) -> None:
    """Compare two checkouts.

    Args:
        old: Checkout to compare with; the data and the list of recipes are its.
        new: The other checkout; the same path again shows whether runs are deterministic.
        runs: Recipes or names of runs, instead of all.
        steps: Steps of each run.
        work: Folder for data, runs and the results of the first checkout.
        within: Share of a number by which it may differ, for changes of the order of sums.
    """
    began = time.time()
    old, new, work = old.resolve(), new.resolve(), work.resolve()
    old_folder = prepared(old, work)
    new_folder = work / "second"
    shutil.rmtree(new_folder, ignore_errors=True)
    new_folder.mkdir()
    if not (old_folder / "data-is-whole").exists():
        write_data(old, old_folder)
        (old_folder / "data-is-whole").touch()
    rows = [compare_data(new, old_folder, new_folder)]
    chosen = [case for case in cases(recipe_names(old)) if not runs or {case.name, case.recipe} & {*runs}]
    needed = {case.after for case in chosen} - {case.name for case in chosen}
    chosen = [case for case in cases(recipe_names(old)) if case.name in needed] + chosen
    chosen.sort(key=lambda case: case.after is not None)
    for case in chosen:
        before = kept_or_run(old, old_folder, case, steps)
        try:
            now = run_case(new, new_folder, case, steps)
            found, largest = first_difference(before, now, within), largest_difference(before, now)
        except RuntimeError as error:
            found, largest = str(error), math.inf
        rows.append((case.name, found))
        print(f"{case.name}: {found or f'{steps} steps equal'}; largest difference of a loss {largest:.1e}", flush=True)
    show(rows, commit(old), commit(new), steps, time.time() - began)
    if any(found for _, found in rows):
        raise SystemExit(1)


def compare_data(new: Path, old_folder: Path, new_folder: Path) -> tuple[str, str | None]:
    """Writes the data with the other checkout as well. Its runs read these: equal bytes are the same data."""
    write_data(new, new_folder)
    ours, theirs = (
        {name: d for part in ("demo", "photos", "detected") for name, d in parts(f, part)}
        for f in (old_folder, new_folder)
    )
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    found = f"{len(different)} files differ, such as {different[0]}" if different else None
    print(f"data: {found or f'{len(ours)} files equal'}", flush=True)
    return "data", found


def parts(folder: Path, part: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{part}/{name}", digest) for name, digest in digests(folder / part).items())


def show(rows: Sequence[tuple[str, str | None]], old: str, new: str, steps: int, seconds: float) -> None:
    table = Table(title=f"{old} and {new}, {steps} steps each, {seconds:.0f} s")
    for column in ("run", "losses"):
        table.add_column(column)
    for name, found in rows:
        table.add_row(name, "equal" if found is None else f"[bold]{found[-300:]}[/bold]")
    Console().print(table)
    different = sum(found is not None for _, found in rows)
    print(f"{len(rows) - different} equal, {different} different")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
