"""The arms of a comparison: the configs of recipes with their settings, the budget as their length, and shared tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvlp import dist
from fastvlp.comparison.plan import Plan
from fastvlp.comparison.settings import check_arms, with_settings
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.recipes import names, recipe
from fastvlp.training.train_config import TrainConfig

Recipe = str | Path | TrainConfig


def prepared(
    recipes: Sequence[Recipe], settings: Sequence[str], plan: Plan, shared: Mapping[str, TrainConfig] | None = None
) -> dict[str, TrainConfig]:
    """The configs of a comparison's arms by name, as they are trained. `shared`: arms whose tokenizers they share."""
    arms = with_precision(with_budget(named_arms(recipes, settings), plan))
    return with_tokenizers(arms, plan.out, shared or {})


def with_precision(arms: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The configs with the number type that `auto` means on their devices, so that the report says it."""
    devices = {name: dist.pick_device(run.device) for name, run in arms.items()}
    return {
        name: replace(run, precision=dist.pick_precision(run.precision, devices[name])) for name, run in arms.items()
    }


def named_arms(recipes: Sequence[Recipe], settings: Sequence[str]) -> dict[str, TrainConfig]:
    """The configs by name, with their settings: a file's name without its ending, or the name of a config."""
    if not recipes:
        raise UserError(f"name at least one recipe, such as one of {', '.join(names())}")
    arms = arm_names(recipes)
    check_distinct(arms)
    check_arms(settings, arms)
    configs = [r if isinstance(r, TrainConfig) else recipe(str(r)) for r in recipes]
    return {arm: with_settings(config, settings, arm) for arm, config in zip(arms, configs)}


def arm_names(recipes: Sequence[Recipe]) -> list[str]:
    """Returns the names of recipes as arms."""
    return [r.name if isinstance(r, TrainConfig) else Path(r).stem for r in recipes]


def check_distinct(names: Iterable[str]) -> None:
    """Raises UserError if two arms have the same name."""
    earlier: set[str] = set()
    for name in names:
        if name in earlier:
            raise UserError(f"two recipes are called {name}; give one of them another name")
        earlier.add(name)


def with_budget(arms: Mapping[str, TrainConfig], plan: Plan) -> dict[str, TrainConfig]:
    """Returns each config with the budget as its length, so that its schedule ends with its training time. A frozen encoder
    encodes within the budget, unless the config says that its states are stored: what computing them takes does not count."""
    return {
        arm: replace(
            run,
            name=arm,
            steps=int(plan.budget_s) if plan.steps else None,
            budget_s=None if plan.steps else plan.budget_s,
            out=str(plan.out / "runs" / arm),
            **computed_in_time(run),
        )
        for arm, run in arms.items()
    }


def computed_in_time(run: TrainConfig) -> dict[str, Any]:
    """Fields that keep a run's work within the time that is measured: states of a frozen encoder are not stored before, unless
    the config says so, and on a CPU there are no loader processes, whose CPU time is not counted."""
    states = replace(run.states, store="never") if run.states.store == "auto" else run.states
    on_cpu = dist.pick_device(run.device).type == "cpu"
    data: Any = run.data
    return {"states": states, "data": replace(data, workers=0) if on_cpu and getattr(data, "workers", False) else data}


def with_tokenizers(
    arms: Mapping[str, TrainConfig], out: Path, shared: Mapping[str, TrainConfig] | None = None
) -> dict[str, TrainConfig]:
    """Configs that would each train a tokenizer on the same texts share one, which is trained here and saved in `out`, or was
    trained there for the arms in `shared`."""
    trained: list[tuple[Any, int, str]] = [
        (run.data, run.vocab, run.tokenizer)
        for run in (shared or {}).values()
        if run.tokenizer is not None and Path(run.tokenizer).parent == out
    ]
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
