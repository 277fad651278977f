"""``kvb.load``: into a module that is there, or of a folder that knows what it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import nn

from kvb import checkpoints
from kvb.modules import hub, pretrained
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.discrete import DiscreteKeyValueBottleneck
from kvb.modules.encoders import BottleneckedEncoder

_NAMED = (
    pretrained.CLIPBottleneckedEncoder,
    pretrained.ConvMixerBottleneckedEncoder,
    pretrained.DinoBottleneckedEncoder,
    pretrained.SLPretrainedBottleneckedEncoder,
    pretrained.SwavBottleneckedEncoder,
    pretrained.VICRegBottleneckedEncoder,
)
CLASSES: dict[str, Any] = {
    one.__name__: one for one in (KeyValueBottleneck, BottleneckedEncoder, DiscreteKeyValueBottleneck, *_NAMED)
}
_Module = TypeVar("_Module", bound=nn.Module)
_Path = str | os.PathLike[str]


@overload
def load(module: _Module, path: _Path) -> _Module: ...
@overload
def load(module: _Path, path: None = None, **arguments: Any) -> nn.Module: ...


def load(module: nn.Module | _Path, path: _Path | None = None, **arguments: Any) -> nn.Module:
    """Load a file into a module, all or nothing; or build the module that a folder of ``save_pretrained`` holds.

    ``load(module, path)`` reads files of ``save`` and plain state_dicts of others, in both formats, whatever the file's
    name. Never runs code in a file. Names and shapes must match the module's (as ``strict=True``); the tensors take its
    dtypes and devices. Meanwhile the file's tensors are in memory, once; where a module has hooks, or methods of its
    own that load, the old content is too. ``load(folder)`` is ``from_pretrained`` of the class that the folder names,
    in eval mode.

    Args:
        module: to load into; or a folder.
        path: of the file, where a module is given.
        arguments: with a folder, those of the constructor that a file cannot hold: ``encoder=``.
    Returns:
        The module.
    Raises:
        CheckpointError: the file is damaged, is no checkpoint, is of another version, or does not fit the module; the
        module is as it was. TypeError: neither module nor folder, or an argument is missing. ValueError: a config that
        is damaged, of a newer kvb, or of an unknown class. OSError: a file cannot be read.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> bottleneck.save_pretrained("memory")
        >>> torch.equal(kvb.load("memory").values, bottleneck.values)
        True
    """
    if isinstance(module, (str, os.PathLike)):
        return _build(Path(module), path, arguments)
    if path is None or arguments:
        raise TypeError("load() takes a module and a file, or a folder and the constructor's arguments for it")
    return checkpoints.load(module, path)


def _build(folder: Path, path: Any, arguments: dict[str, Any]) -> nn.Module:
    if path is not None:
        raise TypeError(f"load(): argument 'module' must be torch.nn.Module, not {type(folder).__name__}")
    if not folder.is_dir():
        raise TypeError(
            f"load(): {folder} is no folder of save_pretrained; build the module that the file is for, and call "
            "kvb.load(module, path)"
        )
    name = hub.read_config(folder)["class"]
    if name not in CLASSES:
        raise ValueError(f"{folder} holds a {name[:80]}, which is no class of kvb: call from_pretrained of that class")
    found: nn.Module = CLASSES[name].from_pretrained(folder, **arguments)
    return found
