"""AdamW with the parameter groups of METER and FLM (arXiv 2111.02387, 2303.14038; spec flm.md section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fastvlp.train.pretraining import Pretraining
from fastvlp.train.schedule import Decay


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """lr: of the towers; `cross_multiplier` times it for fusion and reconstructor, `head_multiplier` times it for the
    vocabulary heads and what objectives own (the paper starts the towers from trained weights and uses 5 for both; from
    scratch use 1). clip: largest gradient norm, or None. warmup: share of the run. No decay for biases and norms."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = 1.0
    cross_multiplier: float = 5.0
    head_multiplier: float = 5.0
    warmup: float = 0.05
    decay: Decay = "linear"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the run, from 0 to below 1, not {self.warmup}")


def parameter_groups(pretraining: Pretraining, config: OptimConfig) -> list[dict]:
    """Groups by the module that owns a parameter; each group's `base_lr` is what the schedule scales."""
    model = pretraining.model
    cross: list[nn.Module] = [model.fusion, *([model.reconstructor] if model.reconstructor else [])]
    heads = [head for head in (model.head, model.forward_head, model.reverse_head) if head is not None]
    multiplier = {id(p): config.cross_multiplier for p in _parameters(cross)}
    multiplier |= {id(p): config.head_multiplier for p in _parameters([*heads, pretraining.objectives])}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in pretraining.parameters():
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((multiplier.get(id(parameter), 1.0), decay), []).append(parameter)
    return [
        {"params": params, "lr": config.lr * times, "base_lr": config.lr * times, "weight_decay": decay}
        for (times, decay), params in groups.items()
    ]


def _parameters(modules: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    return (parameter for module in modules for parameter in module.parameters())


def adamw(pretraining: Pretraining, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(pretraining, config), betas=config.betas, eps=config.eps, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor
