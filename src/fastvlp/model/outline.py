"""A model without memory for its weights, to compare a config with the weights beside it before the model is made.

A damaged config may state a width or a depth of a billion: making the model would take all memory or all time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig, VLModel

# What draws numbers into a tensor that it is given; PyTorch's functions for new layers, and what they call.
DRAWS = {torch.Tensor.normal_, torch.Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_} | {
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
}


class _TooManyError(Exception):
    """The model has more parameters than there are tensors."""


class _Undrawn(TorchFunctionMode):
    """Context in which tensors without memory get no random numbers: PyTorch would draw none, and take most of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def check_fits(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raises UserError if a model of this config has other parameters than `shapes`, by name, or cannot be made at all."""
    try:
        # A parameter that is shared is registered more than once.
        with _at_most(4 * len(shapes) + 64), torch.device("meta"), _Undrawn():
            own = {name: tuple(x.shape) for name, x in VLModel(config).state_dict().items()}
    except NotImplementedError:
        return  # an encoder of the user's own that reads numbers while it is made
    except _TooManyError:
        raise UserError(
            f"{source}: has {len(shapes)} tensors, and the model that model.json describes more; copy the folder again"
        ) from None
    except UserError as error:
        raise UserError(f"{source.parent}/model.json: {error}") from error
    # What a config of impossible numbers makes torch raise.
    except Exception as error:
        raise UserError(
            f"{source.parent}/model.json: no such model can be made ({error}); copy the folder again"
        ) from error
    for name, shape in own.items():
        if name in shapes and shapes[name] != shape:
            remedy = "use the tokenizer" if "vocabulary" in name or "word" in name else "use the config"
            raise UserError(
                f"{source}: {name} has shape {list(shapes[name])}, the model wants {list(shape)}; {remedy} it was saved with"
            )
    if missing := [name for name in own if name not in shapes]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{source}: saved from another model, it lacks {missing[0]}{more}; use the config it was saved with"
        )


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Context in which this thread may register only so many parameters."""
    thread, left = threading.get_ident(), [count]

    def registered(module: Any, name: str, parameter: Any) -> None:
        if threading.get_ident() == thread:
            left[0] -= 1
            if left[0] < 0:
                raise _TooManyError

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()
