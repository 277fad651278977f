"""The layout of a safetensors file: 8 bytes of length, a header in JSON, then all tensors, little end first.

The library makes a file in memory, twice. Here a tensor goes to the file as it is.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_METADATA = "__metadata__"
_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.complex64: "C64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
    **{torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ"},
}
_ALIGNED = 8  # bytes


def parts(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, Iterator[Tensor]]:
    """The first bytes of a file, and the contiguous tensors that follow, in the file's order and byte order.

    Raises:
        TypeError: a dtype that the format does not know, or a tensor with the name that it keeps for itself.
    """
    if unknown := {value.dtype for value in state.values()} - _NAMES.keys():
        raise TypeError(f"safetensors cannot hold {unknown.pop()}: save to another name, x.pt say")
    if _METADATA in state:
        raise TypeError(f"safetensors cannot hold a tensor called {_METADATA!r}: save to another name, x.pt say")
    # The widest first, so that each lies at a multiple of its size.
    order = sorted(state, key=lambda name: (-state[name].itemsize, name))
    header: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name in order:
        value = state[name]
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text, (_little(state[name]) for name in order)


def _little(value: Tensor) -> Tensor:
    if sys.byteorder == "little":
        return value
    numbers = torch.view_as_real(value) if value.is_complex() else value
    return numbers.flatten().view(torch.uint8).view(-1, numbers.itemsize).flip(-1)
