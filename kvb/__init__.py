"""kvb: the fast, exact Discrete Key-Value Bottleneck for PyTorch."""

from kvb import decoders, functional, splitters
from kvb.about import info
from kvb.bottleneck import BottleneckOutput, KeyValueBottleneck
from kvb.keys import KeyReport

__version__ = "0.1.0"

__all__ = [
    "BottleneckOutput",
    "KeyReport",
    "KeyValueBottleneck",
    "decoders",
    "functional",
    "info",
    "splitters",
]
