"""Kernels under names that profilers can tell apart: ``kvb_nearest_filter``, where the function is ``search``."""

from __future__ import annotations

from typing import Any

import triton


def kernel(name: str, **options: Any) -> Any:
    """A Triton kernel that the GPU knows as ``name``; options as of ``triton.jit``."""
    return triton.jit(repr=lambda specialization: name, **options)
