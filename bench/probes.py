"""Fit a linear probe to the images of each arm of a comparison, with fields of classes.

    vlp data import CIFAR10 --out cifar10
    python bench/probes.py comparison --data cifar10

A probe is `vlp evaluate probe`. Rows are appended to bench/results/probes.jsonl; the table has the mean and the standard
deviation of each arm's seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from records import RESULTS, append, mean, stamp
from rich.console import Console
from rich.table import Table

from fastvlp.eval.encoding import Encoding
from fastvlp.eval.probe import evaluate_probe


@dataclass(frozen=True, kw_only=True)
class Options:
    comparison: Annotated[Path, tyro.conf.Positional]
    """Folder of a comparison, with the runs ARM-SEED in its folder runs."""
    data: Path
    """Folder of imported images with a class each, in the splits train and test."""
    prefix: str = ""
    """Beginning of the splits' names, such as singles- for the embedded corpus."""
    label: str = "label"
    """Field of the records with the class."""
    threads: int = 1
    """CPU threads."""
    out: Path = RESULTS / "probes.jsonl"
    """File that rows are appended to."""


def main(o: Options) -> None:
    about = stamp("cpu", "probes.py")
    accuracies: dict[str, list[float]] = {}
    for run in sorted((o.comparison / "runs").iterdir()):
        encoding = Encoding(threads=o.threads, precision="fp32")
        result = evaluate_probe(run, data=o.data, prefix=o.prefix, label=o.label, encoding=encoding)
        arm, _, seed = run.name.rpartition("-")
        accuracy = result.scores["probe"]["top1"]
        accuracies.setdefault(arm, []).append(accuracy)
        scores = {"accuracy": accuracy, "chance": result.chance["top1"], "step": result.step}
        data = {"data": f"{o.data.name}/{o.prefix}", "label": o.label}
        append(o.out, [{**about, "arm": arm, "seed": int(seed), **data, **scores}])
    table = Table("arm", "seeds", "accuracy", title=f"Linear probe on {o.data.name}, {o.label}")
    for arm, values in accuracies.items():
        table.add_row(arm, str(len(values)), f"{mean([100 * value for value in values])} %")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
