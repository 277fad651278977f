"""Makes ``import key_value_bottleneck`` and ``import discrete_key_value_bottleneck`` find kvb."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from kvb import validation
from kvb.modules import bottleneck, discrete, encoders, pretrained

CONTRACTS = ("published", "published-0.0", "seed")
_DISCRETE = "discrete_key_value_bottleneck_pytorch"
_QUANTIZE = "vector_quantize_pytorch"
# Published names, each with its module of kvb.compat.
_ANSWERS = {
    "key_value_bottleneck": "key_value_bottleneck",
    "key_value_bottleneck.core": "key_value_bottleneck.core",
    "key_value_bottleneck.splitters": "key_value_bottleneck.splitters",
    "key_value_bottleneck.utils": "key_value_bottleneck.utils",
    "discrete_key_value_bottleneck": "discrete_key_value_bottleneck",
    _DISCRETE: _DISCRETE,
    f"{_DISCRETE}.{_DISCRETE.removesuffix('_pytorch')}": _DISCRETE,
}
# Only where no such package is installed: pickles of the one before name it.
_STAND_INS = {_QUANTIZE: _QUANTIZE, f"{_QUANTIZE}.{_QUANTIZE}": _QUANTIZE}
NAMES = tuple(_ANSWERS)
_answering: dict[str, ModuleType] = {}


def alias(contract: str = "published") -> None:
    """Let the published packages' names resolve to kvb, in this process, from the next import on.

    The names: ``key_value_bottleneck`` with ``core``, ``splitters`` and ``utils``, ``discrete_key_value_bottleneck``
    and ``discrete_key_value_bottleneck_pytorch``. An installed package of such a name is hidden until ``unalias()``.
    Whole modules that the published packages pickled load with ``torch.load(path, weights_only=False)``, which runs
    code of the file: trust it first.

    Args:
        contract: "published" for replicas of the published code: tuples, a topk axis and negative distances from the
            first, the accidental projections of the other two. "published-0.0" is the same with version 0.0.x of
            ``discrete_key_value_bottleneck_pytorch``, which concatenates its memories. "seed" for kvb's own classes,
            as the seed documents use them.
    Raises:
        ValueError: another contract. RuntimeError: a package of such a name was imported already.
    Examples:
        >>> kvb.compat.alias()
        >>> import key_value_bottleneck.core  # is kvb's replica now
        >>> kvb.compat.unalias()
    """
    validation.choice("contract", contract, CONTRACTS)
    for name in NAMES:
        if name in sys.modules and sys.modules[name] is not _answering.get(name):
            raise RuntimeError(f"{name} was imported already; call kvb.compat.alias() before the first import of it")
    unalias()
    answers = {name: importlib.import_module(f"kvb.compat.{module}") for name, module in _ANSWERS.items()}
    if contract == "seed":
        answers = {name: _own(name, module) for name, module in answers.items()}
        for name in ("core", "splitters", "utils"):
            setattr(answers["key_value_bottleneck"], name, answers[f"key_value_bottleneck.{name}"])
    elif contract == "published-0.0":
        old = importlib.import_module(f"kvb.compat.{_DISCRETE}_0_0")
        answers |= {name: old for name, module in _ANSWERS.items() if module == _DISCRETE}
    if contract != "seed" and _QUANTIZE not in sys.modules and importlib.util.find_spec(_QUANTIZE) is None:
        answers |= {name: importlib.import_module(f"kvb.compat.{module}") for name, module in _STAND_INS.items()}
    _answering.update(answers)
    sys.modules.update(answers)


def unalias() -> None:
    """Undo ``alias``; names imported meanwhile stay what they are.

    Examples:
        >>> kvb.compat.alias("seed")
        >>> kvb.compat.unalias()
    """
    for name, module in _answering.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _answering.clear()


def _own(name: str, published: ModuleType) -> ModuleType:
    """A module of a published name with kvb's own class wherever the published one has a class of that name."""
    module = ModuleType(name, f"{name}, answered by kvb's own classes.")
    for label, value in vars(published).items():
        for room in (bottleneck, encoders, pretrained, discrete):
            value = getattr(room, label, value)
        if isinstance(value, type) and value.__module__.startswith("kvb."):
            setattr(module, label, value)
    module.__path__ = []  # a package, so that submodules are looked for in sys.modules
    return module
