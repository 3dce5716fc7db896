"""The model without memory that is compared with a file of weights before the model is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch.overrides import TorchFunctionMode

from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.model.outline import DRAWS, check_fits
from tests.made import made_config


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("initial", ["bert", "mae"])
def test_no_numbers_are_drawn_for_a_model_without_memory(initial):
    config = replace(made_config(separate_heads=True), initial=initial)
    with Calls() as made:
        shapes = {name: tuple(x.shape) for name, x in VLModel(config).state_dict().items()}
    assert DRAWS.intersection(made.functions)
    with Calls() as outlined:
        check_fits(config, shapes, Path("run/last.safetensors"))
    assert outlined.functions and not DRAWS.intersection(outlined.functions)
    with pytest.raises(UserError, match="lacks"):
        check_fits(config, dict(list(shapes.items())[1:]), Path("run/last.safetensors"))
