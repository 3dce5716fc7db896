"""Muon for the matrices of the layers, AdamW for all else: one optimiser with one list of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastvlp.errors import UserError
from fastvlp.model.layers import Block


class MuonAndAdamW(torch.optim.Optimizer):
    """Updates the groups with `muon` by Muon (Jordan et al. 2024), whose steps have the size of AdamW's (arXiv 2502.16982,
    section 2.2), so that both learn at the same rates; and the others by fused AdamW."""

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], eps: float):
        matrices = [group for group in groups if group["muon"]]
        self._adamw = torch.optim.AdamW([g for g in groups if not g["muon"]], betas=betas, eps=eps, fused=True)
        self._muon = torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Groups and states are this optimiser's."""
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._muon.param_groups = [group for group in self.param_groups if group["muon"]]
        self._adamw.state = self._muon.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self._adamw.step()
        self._muon.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def split_groups(groups: Sequence[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """The groups in two parts each: the matrices of layers, with `muon`, and the rest.

    Raises UserError if no matrix of a layer is trained, or PyTorch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"`optim.matrices` muon needs torch 2.9 or later, and this is {torch.__version__}")
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    matrices = {id(p) for block in blocks for p in block.parameters() if p.ndim == 2}
    parts = [
        {**group, "params": [p for p in group["params"] if (id(p) in matrices) == muon], "muon": muon}
        for muon in (False, True)
        for group in groups
    ]
    if not any(part["params"] for part in parts if part["muon"]):
        raise UserError("`optim.matrices` muon: no matrix of a transformer layer is trained here; use adamw")
    return [part for part in parts if part["params"]]
