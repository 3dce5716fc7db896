"""How many steps FLM's variants and rivals need for a score, and what a step of each costs.

    vlp data demo --level easy --out easy --pairs 0 --singles 0
    python bench/steps_to_score.py cost --data easy
    python bench/steps_to_score.py train --data easy --arms mlm 500 flm 256 flm_shallow 397 --seeds 0 1

`cost`: the CPU time of a step of each arm as a multiple of the first arm's; they take turns on batches of the same rows.
`train`: whole runs of so many steps, the learning rate falling to 0 at their end, scored at fifths of the run as in `vlp
compare`. The time of a run is its steps times their cost, so that other programs on the machine do not count. Rows are
appended to bench/results/steps_to_score.jsonl.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from records import RESULTS, append, stamp
from torch.nn.utils import clip_grad_norm_

from fastvlp import recipe
from fastvlp.batch import Batch
from fastvlp.comparison.scoring import MetricScorer
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.data.tokenize import Tokenizer
from fastvlp.objectives.flm import FLM, FLMConfig
from fastvlp.objectives.objective import combine
from fastvlp.random import uniform
from fastvlp.training.loop import start, steps
from fastvlp.training.state import TrainState, autocast
from fastvlp.training.train_config import TrainConfig

OUT = RESULTS / "steps_to_score.jsonl"


@dataclass(frozen=True, kw_only=True)
class FromImageConfig(FLMConfig):
    """FLM that predicts a quarter of the texts from the image alone, as CapPa does: their spans cover the whole text."""

    def build(self, model, tokenizer) -> FromImage:
        return FromImage(self)


class FromImage(FLM):
    def _spans(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        begin, end = super()._spans(batch)
        alone_B1 = uniform(batch.seed, (1,), 777) < 0.25
        if not self.training:
            return begin, end
        return torch.where(alone_B1, 1, begin), torch.where(alone_B1, batch.ids.shape[1], end)


def one_reconstructor_layer(run: TrainConfig) -> TrainConfig:
    assert run.model.reconstructor is not None
    part = replace(run.model.reconstructor, bottom=0, top=1)
    return replace(run, model=replace(run.model, reconstructor=part))


def one_fusion_layer(run: TrainConfig) -> TrainConfig:
    assert run.model.fusion is not None
    return replace(run, model=replace(run.model, fusion=replace(run.model.fusion, depth=1)))


def half_batch(run: TrainConfig) -> TrainConfig:
    return replace(run, data=replace(run.data, batch_size=16))


def from_image(run: TrainConfig) -> TrainConfig:
    return replace(run, objectives={"flm": FromImageConfig()})


ARMS: dict[str, Callable[[], TrainConfig]] = {
    "ar": lambda: recipe("ar_demo"),
    "mlm": lambda: recipe("mlm_demo"),
    "cappa": lambda: recipe("cappa_demo"),
    "flm": lambda: recipe("flm_demo"),
    "flm_one_reconstructor_layer": lambda: one_reconstructor_layer(recipe("flm_demo")),
    "flm_shallow": lambda: recipe("flm_shallow_demo"),
    "flm_shallow_half_batch": lambda: half_batch(recipe("flm_shallow_demo")),
    "flm_half_batch": lambda: half_batch(recipe("flm_demo")),
    "flm_from_image": lambda: from_image(recipe("flm_demo")),
    "mlm_shallow": lambda: one_fusion_layer(recipe("mlm_demo")),
    "mlm_half_batch": lambda: half_batch(recipe("mlm_demo")),
}


def run_of(arm: str, data: Path, tokenizer: Path) -> TrainConfig:
    """An arm on the easy corpus: pictures in four patches, batches by length."""
    run = ARMS[arm]()
    pairs = replace(run.data, train=str(data / "train"), val=str(data / "val"), workers=0, group=8192)  # type: ignore[call-arg]
    model = replace(run.model, image=replace(run.model.image, patch=24))  # type: ignore[call-arg]
    run = replace(run, data=pairs, model=model, tokenizer=str(tokenizer), threads=1, precision="bf16")
    return replace(run, budget_s=None, steps=1 << 20, validate_every=None, checkpoint_every=None)


def shared_tokenizer(data: Path, folder: Path) -> Path:
    """That of all recipes here, trained once."""
    run = recipe("flm_demo")
    texts = replace(run.data, train=str(data / "train")).texts()
    Tokenizer.train(texts, "wordpiece", vocab_size=run.vocab).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def train(
    data: Path, arms: Mapping[str, int], seeds: tuple[int, ...] = (0,), items: int = 256, out: Path = OUT
) -> None:
    """Train each arm for a number of steps with each seed.

    Args:
        data: Folder of the embedded corpus.
        arms: Steps of each arm.
        seeds: Seeds.
        items: Pairs of `val` that are scored.
        out: File that rows are appended to.
    """
    scorer = MetricScorer(ScoringOptions(cloze_items=items, probe_batch=64))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = shared_tokenizer(data, Path(folder))
        for seed in seeds:
            for arm, count in arms.items():
                run = replace(run_of(arm, data, tokenizer), steps=count, seed=seed, out=f"{folder}/{arm}-{seed}")
                state = start(run)
                marks = {round(count * share / 5) for share in range(1, 6)}
                for report in steps(state):
                    if report.step not in marks:
                        continue
                    found = scorer.score(state, tuned=False)
                    state.pretraining.train()
                    row = {"arm": arm, "seed": seed, "steps": count, "step": report.step}
                    row |= {"scores": found.values, "errors": found.errors}
                    print(row, flush=True)
                    append(out, [stamp("cpu", "steps_to_score.py") | row])


def one_step(state: TrainState, batch: Batch) -> float:
    """CPU seconds of a step without its loader."""
    began = time.thread_time()
    with autocast(state):
        loss = combine(state.pretraining(batch), state.pretraining.counts(batch))
    loss.backward()
    clip_grad_norm_(state.pretraining.parameters(), 1.0)
    state.optimiser.step()
    state.optimiser.zero_grad()
    return time.thread_time() - began


def cost(data: Path, arms: tuple[str, ...] = tuple(ARMS), rounds: int = 30, out: Path = OUT) -> None:
    """Measure what a step of each arm costs beside one of the first arm.

    Args:
        data: Folder of the embedded corpus.
        arms: Arms; the others are divided by the first.
        rounds: Steps of each, after two to warm up.
        out: File that rows are appended to.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = shared_tokenizer(data, Path(folder))
        states = {arm: start(replace(run_of(arm, data, tokenizer), out=f"{folder}/{arm}")) for arm in arms}
        batches: dict[str, Iterator] = {arm: state.train.batches() for arm, state in states.items()}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(-2, rounds):
            for arm in arms[:: 1 if number % 2 else -1]:
                taken = one_step(states[arm], next(batches[arm])[0])
                if number >= 0:
                    seconds[arm].append(taken)
    rows = []
    for arm in arms:
        ratio = statistics.median(own / first for own, first in zip(seconds[arm], seconds[arms[0]]))
        rows.append(
            {"arm": arm, "cost": ratio, "of": arms[0], "ms": 1e3 * statistics.median(seconds[arm]), "rounds": rounds}
        )
        print(f"{arm}: {ratio:.3f} steps of {arms[0]}")
    append(out, [stamp("cpu", "steps_to_score.py") | row for row in rows])


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.extras.subcommand_cli_from_dict({"train": train, "cost": cost}, description=__doc__)
