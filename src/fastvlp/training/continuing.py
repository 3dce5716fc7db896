"""The changes that a continued run may make. Data that were moved are recognised by their content. Other fields may change
if the user names them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastvlp.config import Json, differences, flatten, to_json, with_defaults
from fastvlp.data.loader import Loader
from fastvlp.errors import UserError
from fastvlp.training.train_config import CHANGEABLE, TrainConfig

# Fields that say where data are, and not what they are.
PLACES = {"data.train": "train", "data.val": "val"}
# Beginning of the names of the shares of mixed data; the rest of each name is the place of the data.
MIX = "data.mix."
# Fields that decide which rows batch number s has.
ORDER = (
    "data.batch_size", "data.max_tokens", "data.group", "data.fill", "seed", "data.order", "data.shuffle_buffer",
    "data.streams",
)  # fmt: skip
# Fields that matter only in one order of records.
OF_SEQUENTIAL = ("data.shuffle_buffer", "data.streams")
# Changeable fields that decide what validation measures.
MEASURES = ("validation_rows", "masked_validation")


def check_names(run: TrainConfig, change: Collection[str], saved: Mapping[str, Any] | None = None) -> set[str]:
    """Returns the names of the fields that may differ, as in the config; the name of a part or mapping means all of its fields.
    Raises UserError for a name that neither the run nor the `saved` config has."""
    known = {*flatten(to_json(run)), *flatten(dict(saved or {})), "ranks"}
    names = {name.replace("-", "_") for name in change}
    for name in sorted(names - known):
        if any(field.startswith(f"{name}.") for field in known):
            continue
        near = get_close_matches(name, known, n=1)
        raise UserError(f"`change`: a run has no field {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return names


def changed_fields(saved: Mapping[str, Any], run: TrainConfig) -> dict[str, tuple[Json, Json]]:
    """Returns the different fields that make another run, by name: (then, now). The places of data are not among them: they are
    compared later, by content."""
    changed = differences(with_defaults(saved["run"], run), to_json(run))
    then, now = flatten(with_defaults(saved["run"], run)), flatten(to_json(run))
    free = {*CHANGEABLE, *PLACES, *_unused(then, now)}
    if [*_mixed(then).values()] == [*_mixed(now).values()]:
        free |= {*_mixed(then), *_mixed(now)}
    return {name: values for name, values in changed.items() if name not in free}


def _mixed(fields: Mapping[str, Json]) -> dict[str, Json]:
    """Returns the shares of mixed data by the names of their fields, in the order in which the data are joined."""
    return {name: share for name, share in fields.items() if name.startswith(MIX)}


def _unused(then: Mapping[str, Json], now: Mapping[str, Json]) -> tuple[str, ...]:
    """Returns the fields that have no effect in these two runs."""
    return OF_SEQUENTIAL if then.get("data.order") == now.get("data.order") == "random" else ()


def changed_data(
    saved: Mapping[str, Any], run: TrainConfig, contents: Mapping[str, str | None], rows: int
) -> dict[str, tuple[Json, Json]]:
    """Returns the places whose data differ from those of the saved run: (then, now). If the content is not known, the place
    must be the same."""
    then, now, changed = flatten(saved["run"]), flatten(to_json(run)), {}
    known = saved.get("contents", {})
    for name, split in PLACES.items():
        if known.get(split) is not None and contents.get(split) is not None:
            same = known[split] == contents[split]
        else:
            same = then.get(name) == now.get(name)
            if split == "train":
                same = same and saved["rows"] == rows and [*_mixed(then)] == [*_mixed(now)]
        if not same:
            changed[name] = (then.get(name), now.get(name))
    return changed


def refuse(path: Path, changed: Mapping[str, tuple[Any, Any]], change: Collection[str] = ()) -> None:
    """Raises UserError if another run saved the checkpoint. `changed`: the fields that differ. `change`: the fields that may
    differ."""
    unwanted = {
        name: values for name, values in changed.items() if not any(f"{name}.".startswith(f"{c}.") for c in change)
    }
    if not unwanted:
        return
    fields = "; ".join(
        f"{name}: {old} then, {new} now" if old != new else f"{name}: {new} holds other records now"
        for name, (old, new) in unwanted.items()
    )
    raise UserError(
        f"{path}: saved by another run ({fields}); resume with the same values, name what may differ in `change` "
        f"({' '.join(unwanted)}), or choose another `out`"
    )


def remeasured(saved: Mapping[str, Any], run: TrainConfig, changed: Collection[str]) -> tuple[str, ...]:
    """Returns the changed fields that decide what validation measures. `changed`: the fields that the user allowed to
    change."""
    then, now = flatten(saved["run"]), flatten(to_json(run))
    free = [name for name in MEASURES if name in then and then[name] != now.get(name)]
    return (*free, *(name for name in changed if name == "data.val" or name.startswith("objectives.")))


def first_batch(saved: Mapping[str, Any], run: TrainConfig, train: Loader) -> int:
    """Returns the number of a rank's next batch. If the batches have changed, it is the first batch after the rows that were
    read."""
    then, now = flatten(with_defaults(saved["run"], run)), flatten(to_json(run))
    same = all(then.get(name) == now.get(name) for name in ORDER if name not in _unused(then, now))
    same = same and saved["rows"] == train.count and saved["ranks"] == train.planned_for
    if not same and "places" in saved:
        return train.batch_behind(int(saved["places"]))
    taken = int(saved.get("batches", saved["step"] * int(saved["run"].get("accumulate", 1))))
    return train.dealt(taken * train.planned_for)
