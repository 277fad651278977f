"""``native.c``, compiled with the machine's C compiler when it is first needed."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

# As in the C source.
GRANULE = np.dtype(
    [
        *(("clock", "i4"), ("readers", "u4"), ("writers", "u4")),
        *(("warp_clock", "i4"), ("lane_readers", "u4"), ("lane_writers", "u4")),
        *(("copies", "i4"), ("products", "i2"), ("written", "u1"), ("unfenced", "u1")),
    ]
)
READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE, IN_WARP = 1, 2, 4, 8
COPY, PRODUCT, UNWRITTEN = 32, 64, 128
CHECK, TOUCH = 1, 2


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load; the file goes when Python does."""
    cc = compiler()
    if cc is None:
        raise RuntimeError("the emulator needs a C compiler: none of $CC, cc, gcc and clang is in PATH")
    folder = tempfile.mkdtemp(prefix="kvb-emulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, built = Path(__file__).with_name("native.c"), Path(folder, "native.so")
    # No contraction: every rounding is one of the source's. The code runs on this machine only.
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared"]
    subprocess.run([cc, *flags, "-o", str(built), str(source), "-lm"], check=True)
    loaded = ctypes.CDLL(str(built))
    for name in ("fma_float", "fma_double"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long]
    loaded.tensor_core.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 7
    loaded.shared_access.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_long] * 4
    loaded.shared_access.restype = ctypes.c_long
    loaded.shared_place.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 5 + [ctypes.c_void_p] * 2
    loaded.shared_place.restype = ctypes.c_long
    return loaded


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, version: int, kind: str) -> np.ndarray:
    """c + a b^T as the tensor cores of sm_``version`` round it: a [*, M, 16], b [*, N, 16], c [*, M, N], in float32.

    ``kind``, of the values in a and b, is "f16" or "bf16".
    """
    group, fraction = (8, 24) if version < 90 else (16, 25)
    a, b, c = (np.ascontiguousarray(part, np.float32) for part in (a, b, c))
    batch, M, K = a.shape
    N = b.shape[1]
    if K != 16 or M > 64 or N > 256 or b.shape != (batch, N, K) or c.shape != (batch, M, N):
        raise ValueError(f"expected a [*, M, 16], b [*, N, 16], c [*, M, N]; got {a.shape}, {b.shape}, {c.shape}")
    out = np.empty_like(c)
    least = -14 if kind == "f16" else -126
    pointers = (part.ctypes.data for part in (a, b, c, out))
    library().tensor_core(*pointers, batch, M, N, K, group, fraction, least)
    return out
