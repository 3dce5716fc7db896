"""Building blocks for parts of your own. The interfaces themselves are in `fastvlp`.

- Image encoders: `from_module` makes one of any `nn.Module`, and `with_image` gives it to a model.
- Tasks: `ItemData` and `read_items` read texts about images; `HeadConfig` and `HeadObjective` train a head on a text beside an
  image, which `image_states` and `target_of` feed.
- Data sources: `Match` says how certain it is that a path has the format; `Dropped` and `Note` report what is left out.
- Index engines: `Item` and `Hit` are what an index stores and finds, and `checked_stamp` compares the models of two indexes.
- Metrics: `validation_pairs` yields the batches on which the arms of a comparison are scored.

Each name is imported when it is first used, so that a part waits only for what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlp.batch import Dropped as Dropped
    from fastvlp.comparison.scored_data import validation_pairs as validation_pairs
    from fastvlp.data.sources.interface import Match as Match
    from fastvlp.data.sources.interface import Note as Note
    from fastvlp.model.encoders.module_images import from_module as from_module
    from fastvlp.model.inherited_config import with_image as with_image
    from fastvlp.search.engines.interface import Hit as Hit
    from fastvlp.search.engines.interface import Item as Item
    from fastvlp.search.engines.interface import checked_stamp as checked_stamp
    from fastvlp.tasks.heads import HeadConfig as HeadConfig
    from fastvlp.tasks.heads import HeadObjective as HeadObjective
    from fastvlp.tasks.heads import image_states as image_states
    from fastvlp.tasks.heads import target_of as target_of
    from fastvlp.tasks.item_data import ItemData as ItemData
    from fastvlp.tasks.items import read_items as read_items

_HOME = {
    "Dropped": "batch",
    "HeadConfig": "tasks.heads",
    "HeadObjective": "tasks.heads",
    "Hit": "search.engines.interface",
    "Item": "search.engines.interface",
    "ItemData": "tasks.item_data",
    "Match": "data.sources.interface",
    "Note": "data.sources.interface",
    "checked_stamp": "search.engines.interface",
    "from_module": "model.encoders.module_images",
    "image_states": "tasks.heads",
    "read_items": "tasks.items",
    "target_of": "tasks.heads",
    "validation_pairs": "comparison.scored_data",
    "with_image": "model.inherited_config",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"fastvlp.parts has no {name!r}; its names are {', '.join(__all__)}")
    return getattr(import_module(f"fastvlp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
