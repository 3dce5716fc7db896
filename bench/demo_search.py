"""Measure which searches of the demo's pictures a model of a few hundred steps answers: by colour, by shape, and by both.

    vlp data demo --level easy --out demo/easy --train 3000 --val 400 --test 600 --pairs 0 --singles 0
    python bench/demo_search.py

Each arm is trained, exported and asked for every colour ("a red thing"), every shape ("a circle") and both ("a red circle"). A
row has the share of the first five pictures that show what was asked for, and the share by chance. An arm takes about a minute
and a half on one core. Rows are appended to bench/results/demo_search.jsonl.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from records import RESULTS, append, stamp

from fastvlp import Embedder, export, recipe, train
from fastvlp.data.records.shards import Shards
from fastvlp.model.sizes import joint_space
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.superclip import SuperCLIPConfig
from fastvlp.training.train_config import TrainConfig

FIRST = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Path = Path("demo/easy")
    """Folder of the easy corpus."""
    arms: tuple[str, ...] = ("flip", "flip_superclip", "clip_24", "flm_clip_24")
    """What to train."""
    steps: int | None = None
    """Steps of each arm, instead of the arm's own."""
    out: Path = RESULTS / "demo_search.jsonl"
    """File that rows are appended to."""


def of_steps(run: TrainConfig, steps: int, patch: int) -> TrainConfig:
    model = replace(run.model, image=replace(run.model.image, patch=patch))
    return replace(run, steps=steps, budget_s=None, model=model, validate_every=None, threads=1)


def with_superclip(run: TrainConfig) -> TrainConfig:
    return replace(run, objectives={**run.objectives, "superclip": SuperCLIPConfig()})


def flm_clip(run: TrainConfig) -> TrainConfig:
    model = replace(run.model, embed=joint_space(run.model))
    return replace(run, model=model, objectives={**run.objectives, "clip": CLIPConfig(bound="clip")})


ARMS: dict[str, Callable[[], TrainConfig]] = {
    "flip": lambda: of_steps(recipe("flip_demo"), 300, 12),
    "flip_superclip": lambda: with_superclip(of_steps(recipe("flip_demo"), 300, 12)),
    # A patch is a quarter of the picture, which has one thing at most.
    "clip_24": lambda: replace(of_steps(recipe("flip_demo"), 400, 24), keep=1.0),
    "flm_clip_24": lambda: flm_clip(of_steps(recipe("flm_shallow_demo"), 400, 24)),
}


def trained(run: TrainConfig, o: Options, folder: Path) -> tuple[Embedder, float]:
    """The exported model, and the CPU seconds that its training took."""
    data = replace(run.data, train=str(o.data / "train"), val=str(o.data / "val"))
    run = replace(run, data=data, out=str(folder / "run"), steps=o.steps or run.steps)
    began = time.process_time()
    train(run)
    spent = time.process_time() - began
    export(folder / "run", folder / "export")
    return Embedder.load(folder / "export"), spent


def shares(texts: dict[str, Sequence[bool]], embedder: Embedder, images_NE: np.ndarray) -> dict[str, float]:
    """Mean over texts of the share of fitting pictures among the first, and among all. `texts`: which pictures fit each."""
    scores = np.asarray(embedder.texts(list(texts))) @ images_NE.T
    fits = np.array(list(texts.values()))
    first = np.take_along_axis(fits, np.argsort(-scores, axis=1, kind="stable")[:, :FIRST], axis=1)
    return {"first": float(first.mean()), "chance": float(fits.mean())}


def measure(name: str, o: Options) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        embedder, spent = trained(ARMS[name](), o, Path(folder))
    shards = Shards(o.data / "test")
    images = np.asarray(embedder.images([shards.images(i)[0] for i in range(len(shards))]))
    things = [{(one["colour"], one["shape"]) for one in shards.info(i)["objects"]} for i in range(len(shards))]
    colours, shapes = (sorted({one[n] for some in things for one in some}) for n in (0, 1))
    by = {
        "colour": {f"a {c} thing": [any(one[0] == c for one in some) for some in things] for c in colours},
        "shape": {f"a {s}": [any(one[1] == s for one in some) for some in things] for s in shapes},
        "both": {f"a {c} {s}": [(c, s) in some for some in things] for c in colours for s in shapes},
    }
    return {"arm": name, "train_cpu_s": spent} | {kind: shares(texts, embedder, images) for kind, texts in by.items()}


def main(o: Options) -> None:
    torch.set_num_threads(1)
    common = stamp("cpu", "demo_search.py") | {"options": {k: str(v) for k, v in asdict(o).items() if k != "out"}}
    for name in o.arms:
        row = measure(name, o)
        print(row, flush=True)
        append(o.out, [common | row])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
