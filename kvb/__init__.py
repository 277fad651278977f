"""kvb: the fast, exact Discrete Key-Value Bottleneck for PyTorch."""

from kvb import compat, counting, decoders, functional, growth, optim, splitters, training, unlearning
from kvb.about import __version__, info
from kvb.checkpoints import CheckpointError, load, save
from kvb.classifier import KeyValueClassifier
from kvb.data import CodeDataset
from kvb.modules.bottleneck import BottleneckOutput, KeyValueBottleneck
from kvb.modules.discrete import DiscreteKeyValueBottleneck, DiscreteKeyValueBottleneckConfig
from kvb.modules.encoders import BottleneckedEncoder
from kvb.modules.key_report import KeyReport, dead_code_threshold
from kvb.modules.pretrained import (
    CLIPBottleneckedEncoder,
    ConvMixerBottleneckedEncoder,
    DinoBottleneckedEncoder,
    SLPretrainedBottleneckedEncoder,
    SwavBottleneckedEncoder,
    VICRegBottleneckedEncoder,
)

__all__ = [
    "BottleneckOutput",
    "BottleneckedEncoder",
    "CLIPBottleneckedEncoder",
    "CheckpointError",
    "CodeDataset",
    "ConvMixerBottleneckedEncoder",
    "DinoBottleneckedEncoder",
    "DiscreteKeyValueBottleneck",
    "DiscreteKeyValueBottleneckConfig",
    "KeyReport",
    "KeyValueBottleneck",
    "KeyValueClassifier",
    "SLPretrainedBottleneckedEncoder",
    "SwavBottleneckedEncoder",
    "VICRegBottleneckedEncoder",
    "__version__",
    "compat",
    "counting",
    "dead_code_threshold",
    "decoders",
    "functional",
    "growth",
    "info",
    "load",
    "optim",
    "save",
    "splitters",
    "training",
    "unlearning",
]
