"""What this installation is: versions, and who answers the operators on each device."""

from __future__ import annotations

import platform

import torch

from kvb import ops

__version__ = "0.1.0"

_ABSENT = {
    "cpu": "the C++ extension is not part of this version",
    "cuda": "the Triton kernels are not part of this version",
}


def info() -> dict[str, str]:
    """Versions, the CPU's instruction set, and the backend of every device type with the reason where it is slow."""
    facts = {
        "kvb": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
    }
    for device, why in _ABSENT.items():
        backend = ops.backend(device)
        facts[f"backend on {device}"] = f"{backend} ({why})" if backend == "reference" else backend
    return facts
