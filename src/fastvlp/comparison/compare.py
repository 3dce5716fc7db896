"""`fastvlp.compare` and `vlp compare`: several recipes, the same training time for each, on one device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from fastvlp import dist
from fastvlp.comparison.progress import ProgressDisplay
from fastvlp.comparison.results import Comparison
from fastvlp.comparison.scoring import MetricScorer
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.comparison.settings import check_arms, duration, with_settings
from fastvlp.comparison.turns import EIGHTHS, Plan, run_comparison
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.provenance import about
from fastvlp.recipes import names, recipe
from fastvlp.training.train_config import TrainConfig

SCORING = ScoringOptions()
# On the command line all words before the first option are recipes.
RECIPES = PrimitiveConstructorSpec[Any](
    nargs="*",
    metavar="RECIPE ...",
    instance_from_str=tuple,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [str(one) for one in value],
)


def flat_settings(set: UseAppendAction[tuple[tuple[str, ...], ...]] = ()) -> tuple[str, ...]:
    """Changes of the recipes' fields.

    Args:
        set: FIELD=VALUE ..., such as data.train=FOLDER, for all recipes; RECIPE:FIELD=VALUE for one of them.
    """
    return tuple(setting for group in set for setting in group)


def compare(
    recipes: Annotated[Sequence[str | Path | TrainConfig], RECIPES],
    /,
    *,
    budget: str = "120s",
    seeds: int = 1,
    out: str | Path = Path("comparison"),
    marks: Sequence[float] = EIGHTHS,
    tuned_marks: Sequence[float] = (1.0,),
    slice: str = "5s",
    scoring: ScoringOptions = SCORING,
    set: Annotated[Sequence[str], arg(constructor=flat_settings)] = (),
    threads: int | None = None,
) -> Comparison:
    """Give several recipes the same training time on this device, score them on the way, and write a report.

    The recipes train by turns. They share a tokenizer, trained once, if they would train one on the same texts.

    Args:
        recipes: Names of recipes, paths of your own files, or in Python also configs.
        budget: Training time of each recipe and seed: 90s, 20m, 1.5h. On a CPU this is CPU time of the process, all threads
            together, so that other programs take none of it.
        seeds: Runs of each recipe, with different seeds.
        out: Folder for results.json, report.html and the runs; results and report are complete after every scoring.
        marks: Shares of the budget after which the recipes are scored; the end is always one of them.
        tuned_marks: Those after which scores with a short fine-tuning are measured too, such as VQA; the end always.
        slice: Length of a turn.
        scoring: How the recipes are scored.
        set: Changes of the recipes' fields: FIELD=VALUE for all, RECIPE:FIELD=VALUE for one.
        threads: CPU threads that PyTorch uses; its own choice by default.

    Raises:
        UserError: an option cannot be used, the folder holds a comparison already, or no recipe could be trained.
    """
    if dist.launched() > 1:
        raise UserError("a comparison trains each recipe on one device; start it without torchrun")
    if threads:
        torch.set_num_threads(threads)
    arms = named_arms(recipes, set)
    plan = Plan(
        budget_s=duration(budget),
        out=Path(out),
        seeds=seeds,
        marks=tuple(marks),
        tuned_marks=tuple(tuned_marks),
        slice_s=duration(slice),
    )
    check_new(plan.out)
    device = dist.pick_device(next(iter(arms.values())).device)
    arms = with_tokenizers(with_precision(with_budget(arms, plan)), plan.out)
    reference, machine, scorer = reference_arm(arms), about(device), MetricScorer(scoring)
    with display_of(plan, arms, scoring) as display:
        comparison = run_comparison(plan, arms, reference=reference, about=machine, scorer=scorer, display=display)
    check_trained(comparison, plan)
    return comparison


def display_of(plan: Plan, arms: Iterable[str], scoring: ScoringOptions) -> ProgressDisplay:
    """Shows how far the arms of a plan are."""
    return ProgressDisplay(
        list(arms),
        budget_s=plan.budget_s,
        seeds=plan.seeds,
        scorings=len(plan.shares),
        tuned_scorings=len({*plan.tuned_marks, 1.0}),
        tuning_rows=scoring.probe_steps * scoring.probe_batch,
    )


def check_new(out: Path) -> None:
    """Raises UserError where a folder holds a comparison already."""
    if (out / "results.json").exists():
        raise UserError(f"{out}: holds a comparison already; choose another folder with `out`, or delete it")


def check_trained(comparison: Comparison, plan: Plan) -> None:
    """Raises UserError where no arm was trained to its end."""
    if all(run.failure for run in comparison.runs):
        raise UserError(
            f"no recipe could be trained for {plan.budget_s:g} s: {comparison.runs[0].failure}; what was measured is in "
            f"{plan.out / 'report.html'}"
        )


def with_precision(arms: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The configs with the number type that `auto` means on their devices, so that the report says it."""
    devices = {name: dist.pick_device(run.device) for name, run in arms.items()}
    return {
        name: replace(run, precision=dist.pick_precision(run.precision, devices[name])) for name, run in arms.items()
    }


def named_arms(recipes: Sequence[str | Path | TrainConfig], settings: Sequence[str]) -> dict[str, TrainConfig]:
    """The configs by name, with their settings: a file's name without its ending, or the name of a config."""
    if not recipes:
        raise UserError(f"name at least one recipe; there are {', '.join(names())}")
    arms = [r.name if isinstance(r, TrainConfig) else Path(r).stem for r in recipes]
    check_distinct(arms)
    check_arms(settings, arms)
    configs = [r if isinstance(r, TrainConfig) else recipe(str(r)) for r in recipes]
    return {arm: with_settings(config, settings, arm) for arm, config in zip(arms, configs)}


def check_distinct(names: Iterable[str]) -> None:
    """Raises UserError where two arms have the same name."""
    earlier: set[str] = set()
    for name in names:
        if name in earlier:
            raise UserError(f"two recipes are called {name}; give one of them another name")
        earlier.add(name)


def with_budget(arms: Mapping[str, TrainConfig], plan: Plan) -> dict[str, TrainConfig]:
    """Each config with the budget as its length, so that its schedule ends with its own time. A frozen encoder encodes within
    the budget, unless the config says that its states are stored: what computing them takes does not count."""
    return {
        arm: replace(
            run,
            name=arm,
            steps=None,
            budget_s=plan.budget_s,
            out=str(plan.out / "runs" / arm),
            states=replace(run.states, store="never") if run.states.store == "auto" else run.states,
            data=in_process(run),
        )
        for arm, run in arms.items()
    }


def in_process(run: TrainConfig) -> Any:
    """The data; on a CPU without loader processes, whose CPU time is not counted."""
    on_cpu = dist.pick_device(run.device).type == "cpu"
    data: Any = run.data
    return replace(data, workers=0) if on_cpu and getattr(data, "workers", False) else data


def with_tokenizers(arms: Mapping[str, TrainConfig], out: Path) -> dict[str, TrainConfig]:
    """Configs that would each train a tokenizer on the same texts share one, which is trained here and saved in `out`."""
    trained: list[tuple[Any, int, str]] = []
    with_files = dict(arms)
    for arm, run in arms.items():
        if run.tokenizer is not None or run.init is not None or run.text is not None:
            continue
        path = next((path for data, vocab, path in trained if (data, vocab) == (run.data, run.vocab)), None)
        if path is None:
            path = str(out / f"tokenizer-{arm}.json")
            Tokenizer.train(run.data.texts(), "wordpiece", vocab_size=run.vocab).save(path)
            trained.append((run.data, run.vocab, path))
        with_files[arm] = replace(run, tokenizer=path)
    return with_files


def reference_arm(arms: Mapping[str, TrainConfig]) -> str:
    """The arm that the others are timed against: the first whose only objective is a baseline (MLM), else the first."""
    alone = [
        arm
        for arm, run in arms.items()
        if len(run.objectives) == 1 and all(config.baseline for config in run.objectives.values())
    ]
    return (alone or list(arms))[0]
