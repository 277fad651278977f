"""kvb: the fast, exact Discrete Key-Value Bottleneck for PyTorch."""

from kvb import decoders, functional, splitters
from kvb.about import __version__, info
from kvb.bottleneck import BottleneckOutput, KeyValueBottleneck
from kvb.keys import KeyReport

__all__ = [
    "BottleneckOutput",
    "KeyReport",
    "KeyValueBottleneck",
    "__version__",
    "decoders",
    "functional",
    "info",
    "splitters",
]
