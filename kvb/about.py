"""What this installation is: versions, and which backend runs on each device type."""

from __future__ import annotations

import platform

import torch

from kvb import ops

__version__ = "0.1.0"


def _backend(device: str) -> str:
    """The backend of a device type; for C++ its instruction set, for plain PyTorch why nothing faster runs."""
    backend = ops.backend(device)
    if backend == "cpp":
        return f"cpp ({torch.ops.kvb.cpu_capability()})"
    why = ops.absent[device]
    return f"{backend} ({why})" if why else backend


def info() -> dict[str, str]:
    """Versions, the CPU's instruction set, and the backend of every device type with the reason where it is slow.

    Examples:
        >>> kvb.info()["kvb"] == kvb.__version__
        True
    """
    facts = {
        "kvb": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
    }
    return facts | {f"backend on {device}": _backend(device) for device in ("cpu", "cuda")}
