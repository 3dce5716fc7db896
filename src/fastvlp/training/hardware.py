"""Properties of a device, and its use: its peak speed, the memory that was held, the bytes that an optimiser step moves."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastvlp.dist import Precision

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def adamw_bytes(parameters: int) -> int:
    """Bytes that a fused fp32 AdamW step must move: weight, gradient, two moments in; all but the gradient out."""
    return parameters * 4 * (4 + 3)


# Dense peaks, FLOP/s: (bf16 tensor cores, plain fp32). NVIDIA's data sheets of H100 (2023), H200 (2024), A100 (2021),
# which print the bf16 figures of Hopper with 2:4 sparsity, twice these. First match of the device's name wins.
_PEAKS = (
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
)


def peak_flops(device: torch.device | str, precision: Precision = "bf16") -> float | None:
    """The device's peak in FLOP/s, None if it is not known: then FLOP/s are reported instead of MFU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((bf16 if precision == "bf16" else fp32 for key, bf16, fp32 in _PEAKS if key in name), None)


def peak_memory(device: torch.device | str) -> int:
    """Most bytes held so far: of the device's tensors, or of this process where the device is the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux lets a new process begin with the peak of the one that started it.
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
