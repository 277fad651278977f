"""Which backend runs on a device type, found once at import; where it is Triton, its kernels register here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvb import reference
from kvb._torch import has_kernel

_CHOSEN = "KVB_CPU_CAPABILITY=torch"
CPU_CAPABILITIES = ("torch", "triton", "portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx")


def _no_kernels() -> str:
    """Why the kernels cannot be imported; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if importlib.util.find_spec("kvb.kernels") is None:
        return (
            "kvb/kernels is no folder, because this checkout was made without symbolic links: run `git config "
            "core.symlinks true`, delete kvb/kernels and run `git checkout kvb/kernels`; or copy kernels/ there"
        )
    return ""


def _find_on_cpu() -> tuple[str, str]:
    """The backend of the CPU, and where that is plain PyTorch, why."""
    wish = os.environ.get("KVB_CPU_CAPABILITY")
    wish = "torch" if wish == "reference" else wish  # its name before 0.2
    if wish is not None and wish not in CPU_CAPABILITIES:
        raise ValueError(
            f"KVB_CPU_CAPABILITY={wish!r}: expected one of {', '.join(CPU_CAPABILITIES)}, or no such variable, which "
            "takes the best that the machine has: unset it"
        )
    if wish == "torch":
        return "torch", _CHOSEN
    if wish == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("KVB_CPU_CAPABILITY=triton runs the GPU's kernels interpreted: set TRITON_INTERPRET=1 too")
        if why := _no_kernels():
            raise ValueError(f"KVB_CPU_CAPABILITY=triton: {why}")
        return "triton", ""
    try:
        importlib.import_module("kvb._C")  # which registers itself
    except ModuleNotFoundError:
        return "torch", (
            "the C++ extension was not built: pip install --no-build-isolation . in an environment with g++ and torch"
        )
    except ImportError as error:
        return "torch", f"the C++ extension cannot be loaded: {error}"
    return "cpp", ""


def _find_on_cuda() -> tuple[str, str]:
    """The same for CUDA and ROCm, which PyTorch calls CUDA too; nothing here touches a device."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch", "this PyTorch was built without CUDA or ROCm"
    if why := _no_kernels():
        return "torch", why
    return "triton", ""


_backends = {"cpu": _find_on_cpu(), "cuda": _find_on_cuda()}
# Why a device type has no fast backend; empty where it has one.
absent: dict[str, str] = {device: why for device, (_, why) in _backends.items()}


@functools.cache
def warn_where_slow(device: str) -> None:
    """Say once what a device type lacks for a fast backend; not to those who chose plain PyTorch."""
    if (why := absent.get(device, "")) and why != _CHOSEN:
        warnings.warn(f"kvb runs in plain PyTorch on {device}, many times slower than it can: {why}", stacklevel=2)


def backend(device: str) -> str:
    """Which backend runs on a device type: "cpp", "triton" or "torch"."""
    return _backends.get(device, ("torch", ""))[0]


@functools.cache
def _kernels() -> Any:
    """The Triton kernels, imported at the first call: Triton is large, and looks for a GPU."""
    return importlib.import_module("kvb.kernels.launch")


def among(names: Sequence[str], device: str) -> tuple[str, ...]:
    """Those of the operators that the fast backend of a device type has."""
    if backend(device) == "torch":
        return ()
    if backend(device) == "triton":
        return tuple(name for name in names if hasattr(_kernels(), name))
    return tuple(name for name in names if has_kernel(f"kvb::{name}", device.upper()))


def _packed_matches(keys: Tensor, packed: Tensor) -> Tensor:
    return reference.packed_matches(keys, packed, _kernels().pack_keys)


def register_kernels(
    library: torch.library.Library,
    fallbacks: Mapping[str, Callable[..., Any]],
    front: Callable[[str, Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Let Triton run the operators on its devices, each behind its front; one without a kernel falls back."""

    def launcher(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(_kernels(), name, fallbacks[name])(*args)

    for device, (found, _) in _backends.items():
        if found == "triton":
            for name in fallbacks:
                run = _packed_matches if name == "packed_matches" else launcher(name)
                library.impl(name, front(name, run), device.upper())


def packed_nbytes(keys: Tensor) -> int:
    """Bytes of one packed codebook in the layout of the backend that runs on the device of ``keys``."""
    (_, K, D), name = keys.shape, backend(keys.device.type)
    if name == "cpp":
        return int(torch.ops.kvb.cpu_packed_nbytes(K, D, keys.dtype == torch.float64))
    layout = _kernels() if name == "triton" else reference
    return int(layout.packed_nbytes(K, D, keys.dtype))
