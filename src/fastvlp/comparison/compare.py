"""`fastvlp.compare` and `vlp compare`: several recipes, the same training time for each, on one device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from tyro.conf import arg

from fastvlp import dist
from fastvlp.comparison.continued import (
    Job,
    check_device,
    check_options,
    check_recipes,
    keep_code,
    read_job,
    results_path,
    saved_settings,
    with_added,
)
from fastvlp.comparison.plan import Plan
from fastvlp.comparison.prepared_arms import prepared, reference_arm
from fastvlp.comparison.progress import ProgressDisplay
from fastvlp.comparison.results import Comparison
from fastvlp.comparison.scoring import MetricScorer
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.comparison.settings import budget_of, duration
from fastvlp.comparison.summary import format_length
from fastvlp.comparison.turns import run_comparison
from fastvlp.config import to_json
from fastvlp.errors import UserError
from fastvlp.provenance import about
from fastvlp.recipe_options import RECIPES, flat_settings
from fastvlp.training.run_folder import locked
from fastvlp.training.train_config import TrainConfig

SCORING = ScoringOptions()


def compare(
    recipes: Annotated[Sequence[str | Path | TrainConfig], RECIPES] = (),
    /,
    *,
    budget: str | None = None,
    seeds: int | None = None,
    out: str | Path = Path("comparison"),
    marks: Sequence[float] | None = None,
    tuned_marks: Sequence[float] | None = None,
    slice: str | None = None,
    scoring: ScoringOptions = SCORING,
    set: Annotated[Sequence[str], arg(constructor=flat_settings)] = (),
    threads: int | None = None,
    resume: bool = False,
    add: Annotated[Sequence[str | Path | TrainConfig], RECIPES] = (),
) -> Comparison:
    """Train several recipes for the same time on this device, score them several times, and write a report.

    The recipes train in turns. If they would train a tokenizer on the same texts, they share one. `resume` continues a
    comparison that was interrupted, and `add` trains further recipes for a finished comparison.

    Args:
        recipes: Names of recipes, paths of your own files, or in Python also configs.
        budget: Training time of each recipe and seed, such as 90s, 20m or 1.5h; by default 120s. On a CPU this is CPU time of
            the process, over all threads, which does not count other programs. 800steps gives each recipe 800 steps instead.
        seeds: Number of runs of each recipe, with different seeds; by default 1.
        out: Folder for results.json, report.html and the runs. Results and report are updated after every scoring.
        marks: Shares of the budget after which the recipes are scored; by default each eighth. The end is always scored.
        tuned_marks: Shares after which scores that need a short fine-tuning, such as VQA, are measured; always at the end.
        slice: Length of a turn; by default 5s, or 5 steps.
        scoring: Options of the scoring.
        set: Changes of the recipes' fields: FIELD=VALUE for all recipes, RECIPE:FIELD=VALUE for one.
        threads: CPU threads that PyTorch uses; by default PyTorch chooses.
        resume: Continue the comparison in `out`, with its recipes and options.
        add: Recipes to train and score in the same way as those of the finished comparison in `out`.

    Raises:
        UserError: An option cannot be used, or differs from the comparison that is continued; the folder already has a
            comparison, or has none to continue; or no recipe could be trained.
    """
    if dist.launched() > 1:
        raise UserError("a comparison trains each recipe on one device; start the command without torchrun")
    if resume and add:
        raise UserError("`resume` continues an interrupted comparison and `add` extends a finished one; give only one")
    if add and recipes:
        raise UserError("`add` reads the comparison's own recipes from its folder; name only the recipes to add")
    out = Path(out)
    plan = plan_fields(budget=budget, seeds=seeds, marks=marks, tuned_marks=tuned_marks, slice=slice)
    with locked(out):
        if not resume and not add:
            check_new(out)
            use_threads(threads)
            return run(new_job(recipes, set, Plan(out=out, **plan), scoring))
        job = read_job(out)
        check_options(job, plan, scoring, () if add else set, threads)
        check_recipes(job, recipes, set)
        use_threads(threads or job.comparison.about.get("threads"))
        return run(on_this_device(job, add, set))


def plan_fields(
    *,
    budget: str | None,
    seeds: int | None,
    marks: Sequence[float] | None,
    tuned_marks: Sequence[float] | None,
    slice: str | None,
) -> dict[str, Any]:
    """Returns the fields of the plan that were given."""
    amount, steps = (None, None) if budget is None else budget_of(budget)
    fields = {
        "budget_s": amount,
        "steps": steps,
        "seeds": seeds,
        "marks": None if marks is None else tuple(marks),
        "tuned_marks": None if tuned_marks is None else tuple(tuned_marks),
        "slice_s": None if slice is None else duration(slice),
    }
    return {name: value for name, value in fields.items() if value is not None}


def use_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def device_of(arms: Mapping[str, TrainConfig]) -> torch.device:
    """Returns the device on which the arms train."""
    return dist.pick_device(next(iter(arms.values())).device)


def here(arms: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """Device, versions, commit, command and date."""
    return about(device_of(arms))


def on_this_device(job: Job, add: Sequence[str | Path | TrainConfig], settings: Sequence[str]) -> Job:
    """The job with further arms, if there are any to add, or to be continued here. Raises UserError if this is no device
    like that of the comparison."""
    if job.comparison.finished and not add:
        return job
    now = here(job.arms)
    check_device(job.comparison, device_of(job.arms), now["device"])
    if add:
        return with_added(job, add, settings, now)
    keep_code(job.comparison, now)
    return job


def display_of(plan: Plan, arms: Iterable[str], scoring: ScoringOptions) -> ProgressDisplay:
    """Shows how far the arms of a plan are."""
    return ProgressDisplay(
        list(arms),
        budget_s=plan.budget_s,
        seeds=plan.seeds,
        scorings=len(plan.shares),
        tuned_scorings=len(plan.tuned_shares),
        tuning_rows=scoring.probe_steps * scoring.probe_batch,
    )


def check_new(out: Path) -> None:
    """Raises UserError if a folder holds a comparison already."""
    if results_path(out).exists():
        raise UserError(
            f"{out}: holds a comparison already; continue it with `resume`, train further recipes for it with `add`, choose "
            "another folder with `out`, or delete it"
        )


def new_job(
    recipes: Sequence[str | Path | TrainConfig], settings: Sequence[str], plan: Plan, scoring: ScoringOptions
) -> Job:
    """The job of a comparison that begins."""
    arms = prepared(recipes, settings, plan)
    comparison = Comparison(
        arms=list(arms),
        reference=reference_arm(arms),
        budget_s=plan.budget_s,
        seeds=plan.seeds,
        shares=plan.shares,
        about=here(arms),
        settings=saved_settings(plan, scoring, settings),
        configs={arm: cast(dict[str, Any], to_json(run)) for arm, run in arms.items()},
        folder=plan.out,
        finished=False,
        clock="cpu" if device_of(arms).type == "cpu" else "wall",
        counted="steps" if plan.steps else "seconds",
    )
    return Job(comparison=comparison, plan=plan, arms=arms, scoring=scoring, settings=tuple(settings))


def run(job: Job) -> Comparison:
    """Trains and scores what is not done yet. Raises UserError if nothing could be trained."""
    plan, comparison, arms = job.plan, job.comparison, job.arms
    with display_of(plan, arms, job.scoring) as display:
        if comparison.finished:
            display.note(f"{plan.out}: this comparison is finished already, nothing is trained")
        else:
            if slow := slow_arms(arms):
                display.note(slow)
            try:
                run_comparison(plan, arms, comparison=comparison, scorer=MetricScorer(job.scoring), display=display)
            except KeyboardInterrupt:
                if results_path(plan.out).exists():
                    display.note(f"{plan.out}: stopped; `vlp compare --resume --out {plan.out}` continues it")
                raise
    check_trained(comparison, plan)
    return comparison


def slow_arms(arms: Mapping[str, TrainConfig]) -> str | None:
    """Names the arms whose chosen precision is slow on this device; None if there are none."""
    device = device_of(arms)
    warnings = {
        name: dist.slow_precision(dist.pick_precision(run.precision, device), device) for name, run in arms.items()
    }
    slow = {name: warning for name, warning in warnings.items() if warning}
    return f"{', '.join(slow)}: {next(iter(slow.values()))}" if slow else None


def check_trained(comparison: Comparison, plan: Plan) -> None:
    """Raises UserError if no arm was trained to its end."""
    if all(run.failure for run in comparison.runs):
        raise UserError(
            f"no recipe could be trained for {format_length(comparison)}: {comparison.runs[0].failure}; what was measured is "
            f"in {plan.out / 'report.html'}"
        )
