"""kvb: the fast, exact Discrete Key-Value Bottleneck for PyTorch.

Modules
    KeyValueBottleneck            keys that are looked up and values that are learned
    BottleneckedEncoder           the same behind an encoder, with a splitter; ...BottleneckedEncoder: named encoders
    DiscreteKeyValueBottleneck    the same for embeddings of any rank, which it projects itself
    KeyValueClassifier            the same as an estimator of scikit-learn

Functions and data
    load, save                    a module from and to a file, all or nothing
    CodeDataset                   codes of a whole data set, to train on without an encoder
    dead_code_threshold           when keys count as dead, from the sizes of a module
    info                          versions, devices, and which backend runs on them
    BottleneckOutput, KeyReport   what calls and ``init_keys`` return
    CheckpointError               what a file that does not fit raises

Rooms
    functional                    the operators
    splitters, decoders           before the bottleneck, and after it
    training, optim               one fused step; optimizers that move fetched rows alone
    unlearning, counting, growth  masks and forgetting; class histograms; pairs for what no key is near to
    compat                        the published packages, under their names
    distributed, integrations,    many processes; Lightning and torchmetrics; the studies;
    experiments, plots            pictures: `import kvb.plots`, and so on

``help(kvb.KeyValueBottleneck)`` and ``help(kvb.unlearning)`` tell of one name; ``python -m kvb`` lists the commands.
"""

# Names without an __all__, which would have help(kvb) print all of all of them.
import importlib
import typing

from kvb.about import __version__ as __version__
from kvb.about import info as info
from kvb.checkpoints import CheckpointError as CheckpointError
from kvb.checkpoints import save as save
from kvb.classifier import KeyValueClassifier as KeyValueClassifier
from kvb.data import CodeDataset as CodeDataset
from kvb.loading import load as load
from kvb.modules.bottleneck import KeyValueBottleneck as KeyValueBottleneck
from kvb.modules.discrete import DiscreteKeyValueBottleneck as DiscreteKeyValueBottleneck
from kvb.modules.discrete import DiscreteKeyValueBottleneckConfig as DiscreteKeyValueBottleneckConfig
from kvb.modules.encoders import BottleneckedEncoder as BottleneckedEncoder
from kvb.modules.key_report import KeyReport as KeyReport
from kvb.modules.key_report import dead_code_threshold as dead_code_threshold
from kvb.modules.outputs import BottleneckOutput as BottleneckOutput
from kvb.modules.pretrained import CLIPBottleneckedEncoder as CLIPBottleneckedEncoder
from kvb.modules.pretrained import ConvMixerBottleneckedEncoder as ConvMixerBottleneckedEncoder
from kvb.modules.pretrained import DinoBottleneckedEncoder as DinoBottleneckedEncoder
from kvb.modules.pretrained import SLPretrainedBottleneckedEncoder as SLPretrainedBottleneckedEncoder
from kvb.modules.pretrained import SwavBottleneckedEncoder as SwavBottleneckedEncoder
from kvb.modules.pretrained import VICRegBottleneckedEncoder as VICRegBottleneckedEncoder

if typing.TYPE_CHECKING:
    from kvb import compat as compat
    from kvb import counting as counting
    from kvb import decoders as decoders
    from kvb import functional as functional
    from kvb import growth as growth
    from kvb import optim as optim
    from kvb import splitters as splitters
    from kvb import training as training
    from kvb import unlearning as unlearning
else:
    _ROOMS = ("compat", "counting", "decoders", "functional", "growth", "optim", "splitters", "training", "unlearning")

    def __getattr__(name):
        """A room, imported when it is first asked for."""
        if name not in _ROOMS:
            raise AttributeError(f"module 'kvb' has no attribute {name!r}")
        return importlib.import_module(f"kvb.{name}")

    def __dir__():
        return sorted({*globals(), *_ROOMS})
