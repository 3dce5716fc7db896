"""Measure what UNITER's pretraining, and each of its objectives, adds to fine-tuned tasks on the embedded corpus.

    vlp data demo
    vlp data demo --out demo/small --train 2000 --val 64 --test 64 --pairs 0 --singles 0
    python bench/uniter_tasks.py nine        # nine fine-tunings of uniter_demo, each with and without pretraining
    python bench/uniter_tasks.py boxes       # the nine tasks after pretraining with and without prediction of boxes
    python bench/uniter_tasks.py objectives  # the objectives added one by one, as in the paper's Table 2 (arXiv 1909.11740)

Runs the `vlp` commands that it prints, in the folder that holds demo/. The first command takes 40 CPU minutes on one core,
the last several hours. Seconds are CPU time. A model without pretraining has made one step, so that it has a tokenizer.
Retrieval scores each image with each caption, and therefore uses the small corpus. Chance is the score of always giving the
most frequent answer or label. Rows are appended to bench/results/uniter_tasks.jsonl.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table

from fastvlp.data.records.shards import Shards

OUT = RESULTS / "uniter_tasks.jsonl"
Row = dict[str, Any]

# Name -> (task, options, steps, learning rate, score that is reported).
NINE: dict[str, tuple[str, tuple[str, ...], int, float, str]] = {
    "vqa": ("vqa", (), 1000, 5e-4, "accuracy"),
    "entailment": ("entailment", (), 1000, 5e-4, "accuracy"),
    "grounding": ("grounding", (), 600, 1e-3, "accuracy"),
    "vcr": ("vcr", (), 1200, 5e-4, "answer"),
    "nlvr2 triplet": ("nlvr2", ("--form", "triplet"), 1000, 5e-4, "accuracy"),
    "nlvr2 pair": ("nlvr2", ("--form", "pair"), 1000, 5e-4, "accuracy"),
    "nlvr2 pair-biattn": ("nlvr2", ("--form", "pair-biattn"), 1000, 5e-4, "accuracy"),
    "retrieval": ("retrieval", (), 600, 5e-4, "recall"),
    "retrieval, hard": ("retrieval", ("--negatives", "hard"), 300, 5e-4, "recall"),
}
FOUR = ("vqa", "entailment", "grounding", "nlvr2 pair-biattn")
# In the paper's order: words, matching, features, classes, alignment.
TABLE: dict[str, tuple[str, ...]] = {
    "none": (),
    "mlm": ("mlm",),
    "mlm + itm": ("mlm", "itm"),
    "mlm + itm + mrfr": ("mlm", "itm", "mrfr"),
    "mlm + itm + mrfr + mrc-kl": ("mlm", "itm", "mrfr", "mrc_kl"),
    "mlm + itm + mrfr + mrc-kl + wra": ("mlm", "itm", "mrfr", "mrc_kl", "wra"),
}
FIELDS = {"vqa": "questions", "entailment": "entailments", "vcr": "choices", "nlvr2": "statements"}
SHARES = {"itm": 6, "mlm": 8, "mrfr": 4, "mrc_kl": 4}


@dataclass(frozen=True, kw_only=True)
class Options:
    what: Annotated[Literal["nine", "boxes", "objectives"], tyro.conf.Positional]
    """The measurement."""
    steps: int = 4800
    """Steps of pretraining."""
    tune: int | None = None
    """Steps of each fine-tuning, instead of the task's own number."""
    batch: int = 64
    """Items in a step of fine-tuning."""
    lr: float | None = None
    """Learning rate of fine-tuning, instead of the task's own."""
    tasks: tuple[str, ...] = ()
    """Tasks, instead of all in `nine` and `boxes`, and four in `objectives`."""
    seeds: int = 1
    """Seeds of `objectives`."""
    first: int = 0
    """The first seed."""
    threads: int = 1
    """CPU threads."""
    data: str = "demo/world"
    """The embedded corpus."""
    small: str = "demo/small"
    """The small embedded corpus."""
    runs: Path = Path("runs/uniter")
    """Folder of the runs; a pretrained run that is there already is not repeated."""
    out: Path = OUT
    """File that rows are appended to."""


def vlp(*words: object) -> float:
    """Runs a command; returns its CPU seconds, which do not depend on what else the machine does."""
    arguments = [*map(str, words)]
    command = " ".join(["vlp", *arguments])
    print(command, flush=True)
    began = cpu_seconds_of_children()
    done = subprocess.run([sys.executable, "-m", "fastvlp", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{command}: exit status {done.returncode}")
    return cpu_seconds_of_children() - began


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pretrain(o: Options, name: str, *more: object, recipe: str = "uniter_demo") -> tuple[Path, float]:
    """The run's folder, and the CPU seconds it took: 0 where the run was there already."""
    out = o.runs / name
    if (out / "last.safetensors").exists():
        return out, 0.0
    data = ("--data.train", f"{o.data}/train", "--data.val", f"{o.data}/val", "--threads", o.threads)
    return out, vlp("pretrain", recipe, "--out", out, *data, *more)


def tune(o: Options, task: str, source: Path, seed: int = 0) -> tuple[dict[str, float], float]:
    """The scores on the split test, and the CPU seconds."""
    kind, task_options, steps, rate, _ = NINE[task]
    out = source.parent / f"{source.name}-{task.replace(', ', '-').replace(' ', '-')}"
    data = o.small if kind == "retrieval" else o.data
    options = ("--from", source, "--data", data, "--out", out, "--seed", seed)
    options += ("--steps", o.tune or steps, "--batch-size", o.batch, "--lr", o.lr or rate)
    seconds = vlp("finetune", kind, *options, "--threads", o.threads, *task_options)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["test"], seconds


def chance(o: Options, task: str, scores: dict[str, float]) -> float:
    """The score without looking: of the most frequent answer or label, or of a random choice, region or image."""
    if task.startswith("retrieval"):
        return recall_by_chance(int(scores["images"]), int(scores["count"]))
    if "chance" in scores:
        return scores["chance"]
    split = f"{o.data}/{'pairs-' * task.startswith('nlvr2')}test"
    shards = Shards(split)
    entries = [entry for i in range(len(shards)) for entry in shards.info(i).get(FIELDS[task.split()[0]], [])]
    if task == "vcr":
        return statistics.mean(1 / len(entry["answers"]) for entry in entries)
    counts = Counter(str(entry.get("label", entry.get("answers"))) for entry in entries)
    return counts.most_common(1)[0][1] / len(entries)


def recall_by_chance(images: int, texts: int) -> float:
    """The mean of R@1, 5 and 10 in both directions for a random order; each image has texts / images captions."""
    own = texts // images
    to_text = [1 - math.comb(texts - own, k) / math.comb(texts, k) for k in (1, 5, 10)]
    return statistics.mean([*(min(1, k / images) for k in (1, 5, 10)), *to_text])


def nine(o: Options) -> Iterator[Row]:
    """A row for pretraining and one for each task, with the CPU seconds of pretraining or of tuning the pretrained model."""
    seed = ("--seed", o.first)
    source, seconds = pretrain(o, "pretrained", "--steps", o.steps, *seed)
    fresh, _ = pretrain(o, "fresh", "--steps", 1, *seed)
    yield {"task": "pretraining", "seconds": seconds}
    for task in o.tasks or NINE:
        scores, seconds = tune(o, task, source, o.first)
        without, _ = tune(o, task, fresh, o.first)
        name = NINE[task][-1]
        row = {"task": task, "pretrained": scores[name], "fresh": without[name], "chance": chance(o, task, scores)}
        yield row | {"seconds": seconds, "score": name, "scores": scores}


def boxes(o: Options) -> Iterator[Row]:
    """A row for each task: after pretraining that predicts boxes too, after the same steps without, and without pretraining."""
    more = ("--steps", o.steps, "--seed", o.first)
    predicted, _ = pretrain(o, "boxes", *more, recipe=str(Path(__file__).parent / "recipes" / "uniter_boxes.py"))
    usual, _ = pretrain(o, "pretrained", *more)
    fresh, _ = pretrain(o, "fresh", "--steps", 1, "--seed", o.first)
    for task in o.tasks or NINE:
        runs = {"boxes": predicted, "pretrained": usual, "fresh": fresh}
        scores = {name: tune(o, task, run, o.first)[0] for name, run in runs.items()}
        name = NINE[task][-1]
        row = {"task": task, "score": name, "chance": chance(o, task, scores["boxes"])}
        yield row | {run: values[name] for run, values in scores.items()} | {"scores": scores}


def objectives(o: Options) -> Iterator[Row]:
    """A row for each seed and each set of objectives, all after the same number of steps; a step runs one objective."""
    for seed in range(o.first, o.first + o.seeds):
        for name, on in TABLE.items():
            # A mix needs a share above 0 for every objective: one that is off gets a step in a thousand million.
            mix = [word for part, share in SHARES.items() for word in (part, share if part in on else 1e-8)]
            more: tuple[object, ...] = ("--steps", o.steps if on else 1, "--seed", seed)
            more += ("--mix", *mix) if on else ()
            more += () if "wra" in on else ("--objectives.itm.align", 0)
            source, seconds = pretrain(o, f"{name.replace(' ', '')}-{seed}", *more)
            scores = {task: tune(o, task, source, seed)[0][NINE[task][-1]] for task in o.tasks or FOUR}
            yield {"objectives": name, "seed": seed, "seconds": seconds, **scores, "sum": sum(scores.values())}


def show(o: Options, rows: list[Row]) -> None:
    table = Table(title="UNITER on the embedded corpus, split test")
    if o.what in ("nine", "boxes"):
        columns: tuple[str, ...] = ("task", "score", "pretrained", "fresh", "chance")
        columns += ("seconds",) if o.what == "nine" else ("boxes",)
        for row in rows:
            row["score"] = row.get("score", "")
    else:
        columns = ("objectives", *(o.tasks or FOUR), "sum")
        rows = [summary(o, name, [row for row in rows if row["objectives"] == name]) for name in TABLE]
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "score", "objectives") else "right")
    for row in rows:
        table.add_row(*(cell(column, row.get(column)) for column in columns))
    Console(width=150).print(table)


def summary(o: Options, name: str, rows: list[Row]) -> Row:
    """Mean and standard deviation over the seeds."""
    columns = {column: [row[column] for row in rows] for column in (*(o.tasks or FOUR), "sum")}
    return {"objectives": name} | {
        column: (statistics.mean(x), statistics.stdev(x) if x[1:] else 0) for column, x in columns.items()
    }


def cell(column: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if column == "seconds":
        return f"{value:.0f}"
    mean, spread = value if isinstance(value, tuple) else (value, 0)
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if spread else "")


def main(o: Options) -> None:
    about, rows = stamp("cpu", "uniter_tasks.py"), []
    for row in {"nine": nine, "boxes": boxes, "objectives": objectives}[o.what](o):
        rows.append(row)
        print(json.dumps(row), flush=True)
        append(o.out, [{**about, **asdict(o), "runs": None, "out": None, **row}])
    show(o, rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
