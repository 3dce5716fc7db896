"""What UNITER's pretraining and each of its objectives bring on the embedded corpus.

    vlp data demo
    vlp data demo --out demo/small --train 2000 --val 64 --test 64 --pairs 0 --singles 0
    python bench/uniter_tasks.py nine        # uniter_demo, nine fine-tunings, and the same from a model that was not pretrained
    python bench/uniter_tasks.py objectives  # the objectives added one by one, as in the paper's Table 2 (arXiv 1909.11740)

Runs the `vlp` commands that it prints, in the folder that has demo/; seconds are of the CPU. A model that was not
pretrained has made one step, so that it has a tokenizer. Retrieval, which scores each image beside each caption, is on the
small one. Chance is what the most frequent answer or label scores. Rows are appended to bench/results/uniter_tasks.jsonl.
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
from records import stamp
from rich.console import Console
from rich.table import Table

from fastvlp.data.records.shards import Shards

RESULTS = Path(__file__).parent / "results" / "uniter_tasks.jsonl"
Row = dict[str, Any]

# Each with its task, options, steps, rate, and the score that is told.
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
# Of the paper's order: words, matching, features, classes, alignment.
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
    """steps: of pretraining. tune: steps of each fine-tuning, of `batch` items, and lr: its rate, instead of the task's own.
    tasks: instead of all in `nine` and four in `objectives`. seeds: of `objectives`, from the `first`. data, small: of
    `vlp data demo`."""

    what: Annotated[Literal["nine", "objectives"], tyro.conf.Positional]
    steps: int = 4800
    tune: int | None = None
    batch: int = 64
    lr: float | None = None
    tasks: tuple[str, ...] = ()
    seeds: int = 1
    first: int = 0
    threads: int = 1
    data: str = "demo/world"
    small: str = "demo/small"
    runs: Path = Path("runs/uniter")
    out: Path = RESULTS


def vlp(*words: object) -> float:
    """CPU seconds that the command took, which other work on the machine does not lengthen."""
    told = ["vlp", *map(str, words)]
    print(" ".join(told), flush=True)
    began = spent()
    done = subprocess.run([sys.executable, "-m", "fastvlp", *told[1:]], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{' '.join(told)}: exit status {done.returncode}")
    return spent() - began


def spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pretrain(o: Options, name: str, *more: object) -> tuple[Path, float]:
    """A run that is there is taken as it is, in no seconds."""
    out = o.runs / name
    if (out / "last.safetensors").exists():
        return out, 0.0
    data = ("--data.train", f"{o.data}/train", "--data.val", f"{o.data}/val", "--threads", o.threads)
    return out, vlp("pretrain", "uniter_demo", "--out", out, *data, *more)


def tune(o: Options, task: str, source: Path, seed: int = 0) -> tuple[dict[str, float], float]:
    """The scores of the split test, and seconds."""
    kind, options, steps, rate, _ = NINE[task]
    out = source.parent / f"{source.name}-{task.replace(', ', '-').replace(' ', '-')}"
    data = o.small if kind == "retrieval" else o.data
    told = ("--from", source, "--data", data, "--out", out, "--seed", seed)
    told += ("--steps", o.tune or steps, "--batch-size", o.batch, "--lr", o.lr or rate)
    seconds = vlp("finetune", kind, *told, "--threads", o.threads, *options)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["test"], seconds


def chance(o: Options, task: str, scores: dict[str, float]) -> float:
    """What is scored without looking: by the most frequent answer or label, or by one choice, region or image of as many."""
    if task.startswith("retrieval"):
        return recall_by_chance(int(scores["images"]), int(scores["count"]))
    if "chance" in scores:
        return scores["chance"]
    split = f"{o.data}/{'pairs-' * task.startswith('nlvr2')}test"
    shards = Shards(split)
    told = [entry for i in range(len(shards)) for entry in shards.info(i).get(FIELDS[task.split()[0]], [])]
    if task == "vcr":
        return statistics.mean(1 / len(entry["answers"]) for entry in told)
    counted = Counter(str(entry.get("label", entry.get("answers"))) for entry in told)
    return counted.most_common(1)[0][1] / len(told)


def recall_by_chance(images: int, texts: int) -> float:
    """Mean of R@1, 5, 10 both ways, in random order, as many captions an image."""
    own = texts // images
    to_text = [1 - math.comb(texts - own, k) / math.comb(texts, k) for k in (1, 5, 10)]
    return statistics.mean([*(min(1, k / images) for k in (1, 5, 10)), *to_text])


def nine(o: Options) -> Iterator[Row]:
    """Seconds of a row are of the pretrained model's fine-tuning; the first row's are of pretraining."""
    told = ("--seed", o.first)
    source, seconds = pretrain(o, "pretrained", "--steps", o.steps, *told)
    fresh, _ = pretrain(o, "fresh", "--steps", 1, *told)
    yield {"task": "pretraining", "seconds": seconds}
    for task in o.tasks or NINE:
        scores, seconds = tune(o, task, source, o.first)
        without, _ = tune(o, task, fresh, o.first)
        name = NINE[task][-1]
        row = {"task": task, "pretrained": scores[name], "fresh": without[name], "chance": chance(o, task, scores)}
        yield row | {"seconds": seconds, "score": name, "scores": scores}


def objectives(o: Options) -> Iterator[Row]:
    """Rows of the table for each seed, all of as many steps: a step of one objective is not a step of another."""
    for seed in range(o.first, o.first + o.seeds):
        for name, on in TABLE.items():
            # What is off keeps a share, which a mix asks for, of a step in a thousand million.
            mix = [word for part, share in SHARES.items() for word in (part, share if part in on else 1e-8)]
            more: tuple[object, ...] = ("--steps", o.steps if on else 1, "--seed", seed)
            more += ("--mix", *mix) if on else ()
            more += () if "wra" in on else ("--objectives.itm.align", 0)
            source, seconds = pretrain(o, f"{name.replace(' ', '')}-{seed}", *more)
            found = {task: tune(o, task, source, seed)[0][NINE[task][-1]] for task in o.tasks or FOUR}
            yield {"objectives": name, "seed": seed, "seconds": seconds, **found, "sum": sum(found.values())}


def show(o: Options, rows: list[Row]) -> None:
    table = Table(title="UNITER on the embedded corpus, split test")
    if o.what == "nine":
        columns = ("task", "score", "pretrained", "fresh", "chance", "seconds")
        for row in rows:
            row["score"] = row.get("score", "")
    else:
        columns = ("objectives", *(o.tasks or FOUR), "sum")
        rows = [summary(o, name, [row for row in rows if row["objectives"] == name]) for name in TABLE]
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "score", "objectives") else "right")
    for row in rows:
        table.add_row(*(told(column, row.get(column)) for column in columns))
    Console(width=150).print(table)


def summary(o: Options, name: str, rows: list[Row]) -> Row:
    columns = {column: [row[column] for row in rows] for column in (*(o.tasks or FOUR), "sum")}
    return {"objectives": name} | {
        column: (statistics.mean(x), statistics.stdev(x) if x[1:] else 0) for column, x in columns.items()
    }


def told(column: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if column == "seconds":
        return f"{value:.0f}"
    mean, spread = value if isinstance(value, tuple) else (value, 0)
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if spread else "")


def main(o: Options) -> None:
    about, rows = stamp("cpu", "uniter_tasks.py"), []
    for row in (nine if o.what == "nine" else objectives)(o):
        rows.append(row)
        print(json.dumps(row), flush=True)
        o.out.parent.mkdir(parents=True, exist_ok=True)
        with o.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**about, **asdict(o), "runs": None, "out": None, **row}) + "\n")
    show(o, rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
