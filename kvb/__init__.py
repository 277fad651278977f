"""kvb: the fast, exact Discrete Key-Value Bottleneck for PyTorch."""

from kvb import decoders, functional, splitters
from kvb.about import __version__, info
from kvb.bottleneck import BottleneckOutput, KeyValueBottleneck
from kvb.checkpoints import CheckpointError, load, save
from kvb.discrete import DiscreteKeyValueBottleneck, DiscreteKeyValueBottleneckConfig
from kvb.keys import KeyReport

__all__ = [
    "BottleneckOutput",
    "CheckpointError",
    "DiscreteKeyValueBottleneck",
    "DiscreteKeyValueBottleneckConfig",
    "KeyReport",
    "KeyValueBottleneck",
    "__version__",
    "decoders",
    "functional",
    "info",
    "load",
    "save",
    "splitters",
]
