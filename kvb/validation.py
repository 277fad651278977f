"""Every argument error message, once: what was expected, what came, and how to fix it.

``TypeError`` for types and dtypes, ``ValueError`` for values and shapes, ``RuntimeError`` for state and devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

Device: TypeAlias = torch.device | str | int | None  # as torch.nn takes one
_SHOWN = 8  # names in a message
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_INTEGER = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_Choice = TypeVar("_Choice", bound=str)


def positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive integer, got {value!r} of type {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value


def count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return value


def epochs(value: Any) -> int:
    return count("epochs", value)


def number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """A number in [low, high), or in (low, high) with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (low < value < high if open_low else low <= value < high):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}), got {value}")
    return float(value)


def choice(name: str, value: Any, options: Sequence[_Choice]) -> _Choice:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")
    chosen: _Choice = value
    return chosen


def placed(device: Device) -> contextlib.AbstractContextManager[Any]:
    """Where tensors are made: by default where PyTorch makes them."""
    return contextlib.nullcontext() if device is None else torch.device(device)


def float_dtype(dtype: Any) -> torch.dtype | None:
    """Of parameters; None for PyTorch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    return dtype


def topk(value: Any, pairs: int) -> int:
    if positive_int("topk", value) > pairs:
        raise ValueError(f"topk must be at most the {pairs} pairs of a codebook, got {value}")
    return int(value)


def tensor(owner: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{owner}(): argument '{name}' must be Tensor, not {type(value).__name__}{_remedy(name, value)}"
        )
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{owner}(): expected a dense {name}, got {kind}; call {name}.to_dense() or pad it first")
    if value.is_quantized:
        raise TypeError(f"{owner}(): expected a dense {name}, got quantized {value.dtype}; call {name}.dequantize()")
    return value


def _remedy(name: str, value: Any) -> str:
    """How to make a tensor of what is none; empty where nothing is known."""
    if isinstance(value, Mapping) and value:
        names = ", ".join(map(repr, list(value)[:_SHOWN]))
        return f" with {names}; pick one, by inputs_extractor=lambda item: item[...] where a loader gives such items"
    return f"; call torch.from_numpy({name}) first" if hasattr(value, "__array__") else ""


def batches(data: Any) -> None:
    """What ``init_keys`` and its like read, where it is no tensor."""
    found = f"data must be a Tensor or an iterable of batches, not {type(data).__name__}"
    if hasattr(data, "__array__"):
        raise TypeError(f"{found}: call torch.from_numpy(data) first")
    if not isinstance(data, Iterable) and hasattr(data, "__getitem__"):
        raise TypeError(f"{found}: pass torch.utils.data.DataLoader(data, batch_size=256), say, which makes batches")
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise TypeError(found)


def _is_plain(value: Any, dtypes: frozenset[torch.dtype]) -> bool:
    """Whether a value is as it should be, as most are, in a third of the time that it takes to say what is wrong."""
    return type(value) is Tensor and value.dtype in dtypes and value.layout is torch.strided and not value.is_nested


def floating(owner: str, name: str, value: Any) -> Tensor:
    if _is_plain(value, _FLOATING):
        return value
    if not tensor(owner, name, value).is_floating_point() or value.dtype.itemsize < 2:
        raise TypeError(f"{owner}(): expected a floating-point {name}, got {value.dtype}; call {name}.float() first")
    return value


def integer(owner: str, name: str, value: Any) -> Tensor:
    if _is_plain(value, _INTEGER):
        return value
    dtype = tensor(owner, name, value).dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"{owner}(): expected integer {name}, got {dtype}")
    if dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise TypeError(f"{owner}(): PyTorch cannot compute with {dtype} {name}; call {name}.long() first")
    return value


def shape(name: str, value: Tensor, letters: str, sizes: Sequence[int | None], hint: str = "") -> None:
    """``letters`` names the axes, ``sizes`` gives those that are fixed."""
    found = value.shape
    if len(found) == len(sizes):
        for axis, size in enumerate(sizes):
            if size is not None and size != found[axis]:
                break
        else:
            return
    axes = letters.split()
    want = ", ".join(axis if size is None else str(size) for axis, size in zip(axes, sizes, strict=True))
    raise ValueError(
        f"expected {name} of shape ({', '.join(axes)}) = ({want}), got {tuple(found)}{hint and '; ' + hint}"
    )


def split_features(x: Tensor, C: int, D: int) -> None:
    """x is [B, C, *shape, D]."""
    sizes = x.shape
    if len(sizes) < 3 or sizes[1] != C or sizes[-1] != D:
        raise ValueError(
            f"expected x of shape (B, C, *shape, D) = (B, {C}, *shape, {D}), got {tuple(x.shape)}; a splitter of "
            f"kvb.splitters turns features (B, *shape, channels) into {C} heads of {D}"
        )


def codes(indices: Tensor, C: int) -> None:
    """indices are [B, C, *shape]."""
    if indices.dim() < 2 or indices.shape[1] != C:
        raise ValueError(
            f"expected indices of shape (B, C, *shape) = (B, {C}, *shape), got {tuple(indices.shape)}; "
            "a single sample needs a batch axis, indices[None]"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but "
            f"{name} is on {value.device} and {other_name} are on {other.device}"
        )


def finite(name: str, value: Tensor) -> None:
    """Reads the data: makes the host wait for the device."""
    rows = value.isfinite().all(-1)
    if not rows.all():
        raise ValueError(f"{name} contains NaN or Inf in {int((~rows).sum())} of {rows.numel()} rows")


def mask(owner: str, value: Any, C: int, K: int, name: str = "mask") -> Tensor:
    if tensor(owner, name, value).dtype != torch.bool:
        raise TypeError(f"{owner}(): {name} must be torch.bool, True where a pair may be fetched; got {value.dtype}")
    shape(name, value, "C K", (C, K))
    return value


def positions(owner: str, value: Any, sizes: Sequence[int], letters: str = "B, *shape") -> Tensor:
    """A mask of positions."""
    if tensor(owner, "mask", value).dtype != torch.bool:
        raise TypeError(
            f"{owner}(): mask must be torch.bool, True where a position counts; got {value.dtype}; pass mask != 0"
        )
    if tuple(value.shape) != tuple(sizes):  # a torch.Size would make an exported program of this one size
        raise ValueError(f"expected mask of shape ({letters}) = {tuple(sizes)}, got {tuple(value.shape)}")
    return value


def mask_of_samples(value: Any, N: int) -> None:
    """A mask of positions [N, *shape], where the shape is not known yet."""
    positions("mask", value, (N, *tensor("mask", "mask", value).shape[1:]), "N, *shape")


def code_dtype(dtype: torch.dtype | Literal["auto"], K: int) -> torch.dtype:
    """The storage of indices below K: "auto" is the smallest of int16 and int32 that holds them."""
    if dtype == "auto":
        return torch.int16 if K <= 1 << 15 else torch.int32
    if isinstance(dtype, str) or dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"dtype must be torch.int16, torch.int32, torch.int64 or 'auto', got {dtype!r}")
    if torch.iinfo(dtype).max < K - 1:
        raise ValueError(f"dtype {dtype} cannot hold the index {K - 1} of a codebook with {K} pairs; use 'auto'")
    return dtype
