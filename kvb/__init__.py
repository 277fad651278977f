"""kvb: the fast, exact Discrete Key-Value Bottleneck for PyTorch.

KeyValueBottleneck      keys that are looked up and values that are learned, as a module
BottleneckedEncoder     the same behind an encoder, with a splitter and a decoder
KeyValueClassifier      the same as an estimator of scikit-learn
CodeDataset             codes of a whole data set, to train on without an encoder
load, save              a module from and to a file, all or nothing
info                    versions, devices, and which backend runs on them

Rooms: functional (the operators), splitters, decoders, training, optim, unlearning, counting, memory, compat,
distributed, experiments. ``help(kvb.KeyValueBottleneck)`` tells of one name; what follows here is everything of all of
them.
"""

from kvb import compat, counting, decoders, functional, growth, memory, optim, splitters, training, unlearning
from kvb.about import __version__, info
from kvb.checkpoints import CheckpointError, save
from kvb.classifier import KeyValueClassifier
from kvb.data import CodeDataset
from kvb.loading import load
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
    "memory",
    "optim",
    "save",
    "splitters",
    "training",
    "unlearning",
]
