"""The objectives of a saved model: described when it is saved, and built again where a head of theirs is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch

from fastvlp.config import from_json, to_json
from fastvlp.errors import UserError
from fastvlp.extensions import variant
from fastvlp.model.model import Bos
from fastvlp.model.saving import Saved, load_exactly
from fastvlp.objectives.objective import HEAD_ABILITIES, Ability, Objective, ObjectiveConfig

ABILITIES = frozenset(get_args(Ability))


def describe(
    configs: Mapping[str, ObjectiveConfig], objectives: Mapping[str, Objective], inherited: Iterable[Ability] = ()
) -> dict[str, Any]:
    """Entries of a saved model's `info`, as JSON: what it was trained with, and what it can do without their code.
    `inherited`: abilities that came with the weights it started from."""
    return {
        "reading": next(iter(objectives.values())).reading,
        "bos": common_bos(objectives.values()),
        "objectives": to_json(configs),
        "abilities": {name: sorted(objective.abilities) for name, objective in objectives.items()},
        "inherited_abilities": sorted(inherited),
    }


def common_bos(objectives: Iterable[Objective]) -> Bos:
    """Returns what `<s>` attended to in training: `official` if any objective that reads left to right used it."""
    return "official" if any(objective.bos == "official" for objective in objectives) else "blind"


def abilities(saved: Saved) -> dict[str, frozenset[Ability]]:
    """Returns the abilities that each objective trained, by the objective's name. For models that were saved without them,
    the objectives are built and asked. Raises UserError if the file is damaged, or such an objective is not known."""
    stored = saved.info.get("abilities")
    if stored is None:
        return {name: objective.abilities for name, objective in _built(saved).items()}
    if not isinstance(stored, Mapping) or not all(isinstance(names, list) for names in stored.values()):
        raise UserError(f"{saved.weights}: damaged, abilities are {stored!r}; copy the folder again")
    return {name: ABILITIES.intersection(names) for name, names in stored.items()}


def learned_abilities(saved: Saved) -> frozenset[Ability]:
    """Returns the abilities of the model, from its objectives and from the weights that it started from."""
    own = frozenset().union(*abilities(saved).values())
    if saved.info.get("abilities") is None:
        # Saved before abilities were: whatever has a joint space counted as able to embed.
        return own | {"embed"}
    return own | ABILITIES.intersection(saved.info.get("inherited_abilities") or ())


def saved_bos(saved: Saved) -> Bos:
    """Returns what `<s>` attended to when the model was trained to read left to right."""
    stored = saved.info.get("bos")
    if stored is None:
        return common_bos(_built(saved).values())
    return "official" if stored == "official" else "blind"


def head_names(saved: Saved) -> set[str]:
    """The objectives whose own parameters an ability of the model needs."""
    return {name for name, able in abilities(saved).items() if able & HEAD_ABILITIES}


def saved_configs(saved: Saved) -> dict[str, ObjectiveConfig]:
    """Raises UserError for a config that is damaged, or of a type that is not known."""
    return {name: _config(saved, name, value) for name, value in _stored_configs(saved).items()}


def _stored_configs(saved: Saved) -> Mapping[str, Any]:
    stored = saved.info.get("objectives") or {}
    if not isinstance(stored, Mapping):
        raise UserError(f"{saved.weights}: damaged, objectives are {stored!r}; copy the folder again")
    return stored


def load_objective(saved: Saved, name: str) -> Objective:
    """One objective with the parameters that were kept of it, in evaluation mode on the model's device.

    Raises UserError if its type is not known, or the saved parameters are not the ones that it has.
    """
    stored = _stored_configs(saved)
    if name not in stored:
        raise UserError(f"{saved.weights}: damaged, the config of objective {name!r} is missing; copy the folder again")
    objective = _build(saved, _config(saved, name, stored[name]))
    kept = objective.kept().keys()
    others = {key: value for key, value in objective.state_dict().items() if key not in kept}
    load_exactly(objective, others | saved.learned(name), saved.weights)
    return objective.to(next(saved.model.parameters()).device).eval()


def _config(saved: Saved, name: str, value: Any) -> ObjectiveConfig:
    kind = value.get("type") if isinstance(value, Mapping) else None
    source = f"{saved.weights}, objective {name!r}"
    try:
        known = _known_type(str(kind))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return from_json(known, value, source)


def _known_type(name: str) -> type[ObjectiveConfig]:
    """Those of a task are imported only where no other has the name: with them comes what trains them."""
    try:
        return variant(ObjectiveConfig, name, "fastvlp.objectives")
    except UserError:
        return variant(ObjectiveConfig, name, "fastvlp.tasks")


def _built(saved: Saved) -> dict[str, Objective]:
    """Builds the objectives from their configs, with new parameters."""
    return {name: _build(saved, config) for name, config in saved_configs(saved).items()}


def _build(saved: Saved, config: ObjectiveConfig) -> Objective:
    # Who loads a model in the middle of a run does not change what is drawn next.
    with torch.random.fork_rng(devices=[]):
        return config.build(saved.model.config, saved.tokenizer)
