"""Options that commands over several recipes share: the recipes, and changes of their fields."""

from __future__ import annotations

from typing import Any

from tyro.conf import UseAppendAction
from tyro.constructors import PrimitiveConstructorSpec

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
