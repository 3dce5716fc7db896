"""Reads the known answers of tests/golden: numbers that the original implementations computed (see its README)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Any], dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """(config, tolerances, weights under their original names, everything else), on torch's default device."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["golden"])
        tensors = {key: file.get_tensor(key).clone().to(torch.get_default_device()) for key in file.keys()}  # noqa: SIM118
    known = {k: v for k, v in tensors.items() if k.startswith(("in.", "out.", "grad."))}
    weights = {k: v for k, v in tensors.items() if k not in known}
    return meta["config"], meta["tol"], weights, known


def assert_close(mine: Tensor, known: Tensor, tolerance: float, name: str) -> None:
    assert mine.shape == known.shape, f"{name}: {tuple(mine.shape)} is not {tuple(known.shape)}"
    error = (mine.double().cpu() - known.double().cpu()).abs().max().item() if known.numel() else 0.0
    assert error <= tolerance, f"{name}: off by {error:.3g}, allowed {tolerance:.3g}"
