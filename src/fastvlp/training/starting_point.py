"""A run that starts from a saved model: a recipe with the model's encoders, and with its way to read images and texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastvlp.model.inherited_config import inherited_config
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import read_config
from fastvlp.training.train_config import TrainConfig


def starting_from(run: TrainConfig, folder: str) -> TrainConfig:
    """Returns the config of a recipe's run that starts from the model in a folder: a run, an export, or a converted public
    model.

    The model of the run is the recipe's, with the saved encoders (`inherited_config`). Images are preprocessed as for the saved
    model, unless their boxes must be kept, and texts are cut to the number of positions of the model. Raises UserError if the
    folder is not a saved model, or if the recipe's model cannot be built with its encoders.
    """
    model, data, saved = inherited_config(read_config(folder), run.model), run.data, read_saved_run(folder).data
    fields: dict[str, Any] = {"max_length": min(data.max_length, model.longest_text)}
    if "fit" in saved.stated and getattr(data, "regions", None) is None:
        fields["fit"] = saved.fit
    return replace(run, model=model, data=replace(data, **fields), init=folder)
