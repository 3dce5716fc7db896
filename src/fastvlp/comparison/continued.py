"""A comparison that is in a folder already: continued where it was interrupted, or with further arms once it is finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fastvlp.comparison.plan import OPTION_NAMES, Plan
from fastvlp.comparison.prepared_arms import Recipe, arm_names, named_arms, prepared, with_budget, with_precision
from fastvlp.comparison.results import ArmRun, Comparison
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.comparison.settings import split_setting
from fastvlp.comparison.summary import exact_duration
from fastvlp.config import Json, differences, flatten, from_json, to_json, with_defaults
from fastvlp.errors import UserError
from fastvlp.provenance import other_code
from fastvlp.training.saved_config import read_config
from fastvlp.training.train_config import TrainConfig

# Fields that say where an arm's files are, and not what it is.
FILES = ("out", "tokenizer")
# Fields that say which records an arm reads, by split.
SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("data.train", "data.mix", "data.captions"),
    "val": ("data.val", "data.captions"),
    "test": ("data.test", "data.captions"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arms, settings and plan of a comparison that is continued.

    Attributes:
        arms: the configs by name, as they are trained.
        settings: the changes of the recipes' fields.
    """

    comparison: Comparison
    plan: Plan
    arms: Mapping[str, TrainConfig]
    scoring: ScoringOptions
    settings: tuple[str, ...]


def saved_settings(plan: Plan, scoring: ScoringOptions, settings: Sequence[str]) -> dict[str, Any]:
    """The options of a comparison, as results.json has them."""
    return {k: v for k, v in asdict(plan).items() if k != "out"} | asdict(scoring) | {"set": list(settings)}


def results_path(out: Path) -> Path:
    return out / "results.json"


def read_job(out: Path) -> Job:
    """Reads what a comparison was begun with. Raises UserError if there is none, or this version would train something
    else."""
    path = results_path(out)
    if not path.exists():
        raise UserError(
            f"{out}: holds no comparison; start one without `resume` and `add`, or give the folder of a comparison as `out`"
        )
    comparison = Comparison.load(path)
    plan = from_json(Plan, comparison.settings | {"out": str(out)}, str(path))
    arms = {arm: read_config(config, f"{path}, {arm}") for arm, config in comparison.configs.items()}
    return Job(
        comparison=comparison,
        plan=plan,
        arms={arm: moved(run, arm, out) for arm, run in arms.items()},
        scoring=from_json(ScoringOptions, comparison.settings, str(path)),
        settings=tuple(map(str, comparison.settings.get("set", ()))),
    )


def moved(run: TrainConfig, arm: str, out: Path) -> TrainConfig:
    """The config of an arm whose comparison may be called by another path than when it was begun."""
    before, tokenizer = run.folder.parent.parent, run.tokenizer
    if tokenizer is not None and Path(tokenizer).parent == before:
        tokenizer = str(out / Path(tokenizer).name)
    return replace(run, out=str(out / "runs" / arm), tokenizer=tokenizer)


def check_options(
    job: Job, plan: Mapping[str, Any], scoring: ScoringOptions, settings: Sequence[str], threads: int | None
) -> None:
    """Raises UserError if an option differs from that of the comparison. `plan`: those of its fields that were given;
    `scoring`: an option with its default counts as left out."""
    names = [field.name for field in fields(scoring)]
    given = dict(plan) | {
        name: getattr(scoring, name) for name in names if getattr(scoring, name) != getattr(ScoringOptions(), name)
    }
    known = asdict(job.plan) | asdict(job.scoring)
    changed = {
        OPTION_NAMES.get(k, k): (written(k, known), written(k, known | given))
        for k, value in given.items()
        if known[k] != value
    }
    if settings and tuple(settings) != job.settings:
        changed["set"] = (written("set", {"set": job.settings}), written("set", {"set": settings}))
    if threads is not None and threads != job.comparison.about.get("threads", threads):
        changed["threads"] = (str(job.comparison.about["threads"]), str(threads))
    if changed:
        words = "; ".join(f"`{name}` was {old}, not {new}" for name, (old, new) in changed.items())
        raise UserError(f"{results_path(job.plan.out)}: was started with other options: {words}; leave them out")


def written(name: str, options: Mapping[str, Any]) -> str:
    """An option as it is read: a time or a number of steps with its unit, and several values side by side."""
    if name == "steps":
        # It has the name of the budget, whose unit it is.
        name = "budget_s"
    value = options[name]
    if name in ("budget_s", "slice_s"):
        return f"{value:g} steps" if options["steps"] else exact_duration(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value)) or "none"
    return str(value)


def check_recipes(job: Job, recipes: Sequence[Recipe], settings: Sequence[str]) -> None:
    """Raises UserError if the recipes, if any are named, are not the comparison's arms."""
    if not recipes:
        return
    path, names = results_path(job.plan.out), arm_names(recipes)
    if {*names} != {*job.arms}:
        raise UserError(f"{path}: its arms are {', '.join(job.arms)}, not {', '.join(names)}; leave the recipes out")
    arms = named_arms(recipes, settings or job.settings)
    for arm, run in with_precision(with_budget(arms, job.plan)).items():
        changed = changed_fields(job.arms[arm], run)
        if changed:
            words = "; ".join(f"{name} was {old}, and is {new}" for name, (old, new) in changed.items())
            raise UserError(
                f"{path}: {arm} was another recipe ({words}); leave the recipes out to continue it unchanged"
            )


def changed_fields(saved: TrainConfig, run: TrainConfig) -> dict[str, tuple[Json, Json]]:
    """Fields in which a recipe differs from an arm, by name: (then, now). A tokenizer that it would train is the arm's."""
    changed = differences(with_defaults(to_json(saved), run), to_json(run))
    ignored = FILES if run.tokenizer is None else FILES[:1]
    return {name: values for name, values in changed.items() if name not in ignored}


def check_device(comparison: Comparison, device: torch.device, name: str) -> None:
    """Raises UserError if this is no device like that of the comparison. `name`: what this one is called."""
    clock, known = "cpu" if device.type == "cpu" else "wall", str(comparison.about.get("device", name))
    # The last part is the number of cores, or the memory.
    if comparison.clock != clock or known.rpartition(", ")[0] != name.rpartition(", ")[0]:
        raise UserError(
            f"{comparison.folder}: was measured on {known}, and this is {name}; the same time is another amount of work there. "
            "Go on where it was begun, or start a new comparison in another folder"
        )


def with_added(job: Job, recipes: Sequence[Recipe], settings: Sequence[str], about: dict[str, Any]) -> Job:
    """The job of training further arms as those of a finished comparison were trained. `settings`: ARM:FIELD=VALUE, after the
    comparison's own for all arms; `about`: where and when they are added.

    Raises UserError if it is not finished, has an arm of that name, or was trained on other data.
    """
    comparison, out = job.comparison, job.plan.out
    if not comparison.finished:
        raise UserError(f"{out}: is not finished; finish it with `resume` first, and add to it then")
    for setting in settings:
        if split_setting(setting)[0] is None:
            raise UserError(f"`set` {setting}: is only for arms that are added; write ARM:{setting}")
    shared = [setting for setting in job.settings if split_setting(setting)[0] is None]
    arms = named_arms(recipes, [*shared, *settings])
    if known := [arm for arm in arms if arm in job.arms]:
        raise UserError(f"{out}: has an arm {known[0]} already; give the new one another name, as a file of your own")
    check_same_data(job, with_budget(arms, job.plan))
    arms = prepared(recipes, [*shared, *settings], job.plan, job.arms)
    comparison.sampled = list(comparison.arms)
    comparison.finished = False
    comparison.arms += arms
    comparison.configs |= {arm: to_json(run) for arm, run in arms.items()}  # type: ignore[misc]
    comparison.added |= dict.fromkeys(arms, about)
    comparison.settings["set"] = [*job.settings, *settings]
    return replace(job, arms={**job.arms, **arms})


def check_same_data(job: Job, arms: Mapping[str, TrainConfig]) -> None:
    """Raises UserError if an arm reads none of the records that the comparison's arms read."""
    known = {arm: records(to_json(run)) for arm, run in job.arms.items()}
    for arm, run in arms.items():
        own = records(to_json(run))
        if own not in known.values():
            other, theirs = next(iter(known.items()))
            words = "; ".join(f"{name} {now}, not {then}" for name, (then, now) in differences(theirs, own).items())
            raise UserError(
                f"{arm}: reads other data than {other} ({words}); name the comparison's with `set` {arm}:FIELD=VALUE"
            )


def records(config: Json, splits: Iterable[str] = SPLITS) -> dict[str, Json]:
    """Returns the fields of a config that decide which records an arm reads in these splits."""
    decisive = {field for split in splits for field in SPLITS[split]}
    # `data.mix` has an entry for each folder, so names are compared by their beginning.
    return {
        name: value
        for name, value in flatten(config).items()
        if any(f"{name}.".startswith(f"{field}.") for field in decisive)
    }


def check_records(comparison: Comparison, run: ArmRun) -> None:
    """Raises UserError if a folder has other records now than when an earlier arm or seed was trained on it."""
    for split, content in run.contents.items():
        own = records(comparison.configs[run.arm], [split])
        for earlier in comparison.runs:
            # A mixture has one hash for all of its folders.
            same_folders = own == records(comparison.configs[earlier.arm], [split])
            known = earlier.contents.get(split)
            if same_folders and None not in (known, content) and known != content:
                folder = own.get(f"data.{split}")
                raise UserError(
                    f"{folder}: has other records than {earlier.arm} with seed {earlier.seed} was trained on; "
                    "restore its data, or start a new comparison in another folder"
                )


def keep_code(comparison: Comparison, about: dict[str, Any]) -> None:
    """Adds to the results that a comparison is continued with other code than before. `about`: where and when."""
    known = (comparison.about, *comparison.added.values(), *comparison.continued)
    if all(other_code(earlier, about) for earlier in known):
        comparison.continued.append(about)
