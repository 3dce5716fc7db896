"""A run that starts from a saved model: a recipe with the model's encoders, and with its way to read images and texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastvlp.model.inherited_config import inherited_config
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import read_config
from fastvlp.training.train_config import TrainConfig


def starting_from(run: TrainConfig, folder: str) -> TrainConfig:
    """A recipe's run that starts from the model in a folder: a run, an export, or a converted public model.

    Its model is the recipe's with the saved encoders (`inherited_config`). Its images become squares as they did for the saved
    model, where no boxes of theirs must be kept, and its texts are cut to as many tokens as the model has positions for.
    Raises UserError where the folder is no saved model, or the recipe's model cannot be made of it.
    """
    model, data, saved = inherited_config(read_config(folder), run.model), run.data, read_saved_run(folder).data
    fields: dict[str, Any] = {"max_length": min(data.max_length, model.longest_text)}
    if "fit" in saved.stated and getattr(data, "regions", None) is None:
        fields["fit"] = saved.fit
    return replace(run, model=model, data=replace(data, **fields), init=folder)
