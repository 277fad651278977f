"""The versions of what computed a result: it may depend on them as well as on its configuration."""

from __future__ import annotations

import platform

import sklearn
import torch

import kvb


def versions() -> dict[str, str]:
    """Of kvb, PyTorch, scikit-learn and Python."""
    return {
        "kvb": kvb.__version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
    }
