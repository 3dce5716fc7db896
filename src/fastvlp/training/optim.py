"""AdamW with the parameter groups of METER and FLM (arXiv 2111.02387, 2303.14038) or FLIP (2212.00794)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fastvlp.config import NotNegative, Positive, PositiveShare, ShareBelowOne, check_numbers
from fastvlp.errors import UserError
from fastvlp.training.muon import MuonAndAdamW, split_groups
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.trained_parts import layer_rates

Decay = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and the learning rate of each part of the model over the run."""

    lr: Positive
    """Highest learning rate of the encoders."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.98)
    """Decay of AdamW's averages of the gradient and of its square."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """Optimiser of the matrices of the transformer layers: adamw, which updates all other parameters, or muon at the same
    learning rates (arXiv 2502.16982)."""
    eps: Positive = 1e-8
    """Number that AdamW adds to the denominator."""
    weight_decay: NotNegative = 0.01
    """Weight decay: each step subtracts this share of a weight, times the learning rate."""
    spared: Literal["vectors", "flip"] = "vectors"
    """Parameters without weight decay: vectors means all parameters of one dimension. flip means biases, norms and position
    tables, as in FLIP's released code; there the class token and the temperature decay."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; larger gradients are scaled down. None: no limit."""
    cross_multiplier: NotNegative = 5.0
    """Factor of the learning rate for fusion layers and reconstructor. METER and FLM start from trained encoders and use 5;
    from scratch use 1."""
    head_multiplier: NotNegative = 5.0
    """Factor of the learning rate for vocabulary and matching heads, and for parameters of objectives, except single numbers
    such as a temperature. From scratch use 1."""
    warmup: ShareBelowOne = 0.05
    """Share of the run in which the learning rate rises linearly from 0."""
    decay: Decay = "linear"
    """How the learning rate falls after the warm-up: to 0 along a line (linear) or a cosine (cosine), or not (constant)."""
    layer_decay: PositiveShare = 1.0
    """Factor of the learning rate between a layer of an encoder and the next one, down to its embeddings; 1: the same rate in
    all layers."""
    parts: Mapping[str, Positive] = field(default_factory=dict)
    """Additional factor of the learning rate for parts, by name, such as `image 0.1 text.word 10`. The parameters of the
    objective vqa are called objectives.vqa."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim")


def scaled_rate(base: float, batch: int) -> float:
    """Returns the learning rate for a batch by FLIP's rule: `base` is meant for 256 pairs a step, counted over all ranks (arXiv
    2212.00794, section A.1; Goyal et al., arXiv 1706.02677)."""
    return base * batch / 256


def flip_optim(batch: int, *, base: float = 4e-6, warmup: float = 0.004) -> OptimConfig:
    """Returns FLIP's optimiser settings (arXiv 2212.00794, Table 10) for `batch` pairs a step.

    Args:
        batch: pairs of a step, on all ranks.
        base: learning rate for 256 pairs a step. The paper uses 2e-6 on LAION-2B, and 4e-8 for tuning on whole images.
        warmup: share of the run in which the rate rises. The sizes B and L warm up for 51.2 of 12,800 M pairs, H for 256 M,
            which is 0.02. Tuning on whole images uses 0.2.
    """
    return OptimConfig(
        lr=scaled_rate(base, batch),
        betas=(0.9, 0.95),
        weight_decay=0.2,
        spared="flip",
        clip=None,
        cross_multiplier=1,
        head_multiplier=1,
        warmup=warmup,
        decay="cosine",
    )


def parameter_groups(pretraining: Pretraining, config: OptimConfig) -> list[dict[str, Any]]:
    """Returns groups of parameters with the same learning rate and weight decay. The schedule scales each group's `base_lr`.
    Frozen parameters are in no group."""
    model = pretraining.model
    cross: list[nn.Module] = [model.fusion, *([model.reconstructor] if model.reconstructor else [])]
    heads: list[nn.Module] = [head for head in (model.head, model.forward_head, model.reverse_head) if head is not None]
    heads += model.single.heads if model.config.single is not None else []
    # A temperature and the bias of all logits are single numbers and not layers of a head: they learn at the encoders' rate.
    owned = [parameter for parameter in pretraining.objectives.parameters() if parameter.dim()]
    multiplier = layer_rates(model, config.layer_decay) if config.layer_decay < 1 else {}
    multiplier |= {id(p): config.cross_multiplier for p in _parameters(cross)}
    multiplier |= {id(p): config.head_multiplier for p in (*_parameters(heads), *owned)}
    for part, times in config.parts.items():
        multiplier |= {id(p): multiplier.get(id(p), 1.0) * times for p in _part(pretraining, part)}
    without_decay = spared(pretraining, config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in filter(lambda p: p.requires_grad, pretraining.parameters()):
        decay = 0.0 if id(parameter) in without_decay else config.weight_decay
        groups.setdefault((multiplier.get(id(parameter), 1.0), decay), []).append(parameter)
    if not groups:
        raise UserError("nothing is left to train, since all parts are frozen; name fewer parts in `freeze`")
    return [
        {"params": params, "lr": config.lr * times, "base_lr": config.lr * times, "weight_decay": decay}
        for (times, decay), params in groups.items()
    ]


def spared(pretraining: Pretraining, config: OptimConfig) -> set[int]:
    """Ids of the parameters that do not decay."""
    if config.spared == "vectors":
        return {id(parameter) for parameter in pretraining.parameters() if parameter.ndim < 2}
    norms = [module for module in pretraining.modules() if isinstance(module, nn.LayerNorm)]
    named = (p for name, p in pretraining.named_parameters() if {"bias", "position"} & {*name.split(".")})
    return {id(parameter) for parameter in (*_parameters(norms), *named)}


def _part(pretraining: Pretraining, part: str) -> list[nn.Parameter]:
    """The parameters of a part of the model, or of an objective. Raises UserError if there is no such part."""
    named = {name.removeprefix("model."): parameter for name, parameter in pretraining.named_parameters()}
    matching = [parameter for name, parameter in named.items() if f"{name}.".startswith(f"{part}.")]
    if not matching:
        own = dict.fromkeys(".".join(name.split(".")[: 1 + name.startswith("objectives.")]) for name in named)
        raise UserError(
            f"`optim.parts`: there is no {part}; there are {', '.join(own)}, and in them parts such as text.blocks.0"
        )
    return matching


def _parameters(modules: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    return (parameter for module in modules for parameter in module.parameters())


def build_optimiser(pretraining: Pretraining, config: OptimConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(pretraining, config)
    if config.matrices == "muon":
        return MuonAndAdamW(split_groups(groups, pretraining), config.betas, config.eps)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor


def rate_factor(progress: float, warmup: float, decay: Decay) -> float:
    """The learning rate, as a share of the highest, by progress: 0 at the start of a run and 1 at its end, in steps or in time.
    Linear warm-up over the share `warmup`, then decay to 0 (linear: METER, FLM; cosine: Loshchilov & Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    rest = min(1.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    if decay == "linear":
        return 1 - rest
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1.0
