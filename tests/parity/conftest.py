"""Parity on another device: `FASTVLP_TEST_DEVICE=cuda pytest tests/parity`, as bench/gpu.sh runs it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """Makes tensors on the device that the environment names."""
    name = os.environ.get("FASTVLP_TEST_DEVICE")
    if name:
        torch.set_default_device(name)
    yield
    if name:
        torch.set_default_device(None)
