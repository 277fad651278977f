"""Callbacks for Lightning: keys before the first step, keys that stop learning, usage in the log."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from torch import nn

from kvb import validation
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.key_report import KeyReport
from kvb.modules.wrapping import BottleneckWrapper


def _callback() -> Any:
    """Lightning's base class, under either of its names."""
    try:
        return importlib.import_module("lightning.pytorch").Callback
    except ModuleNotFoundError:
        return importlib.import_module("pytorch_lightning").Callback


Callback: Any = _callback()
_Module = TypeVar("_Module", bound=nn.Module)


class InitKeys(Callback):
    """Before the first step, initialise the keys that still wait for data from the trainer's own training data.

    Equivalent to ``module.init_keys(train_dataloader, method, epochs=epochs, ...)`` for every bottleneck of the
    LightningModule whose keys are not initialised, or with a ``method`` for every one whose keys learn.

    Args:
        method: as for ``init_keys``; None takes the module's ``init_mode``.
        epochs: passes of moving averages.
        freeze: call ``freeze_keys()`` afterwards.
        submodule: the name of the one module to initialise, "memory" say; None for all.
        options: of ``init_keys``: ``inputs_extractor=``, ``mask_extractor=``, ``generator=``, ``progress=``.
    Attributes:
        reports: what ``init_keys`` returned, by the module's name.
    Examples:
        >>> from kvb.integrations.lightning import InitKeys
        >>> trainer = lightning.pytorch.Trainer(logger=False, callbacks=[InitKeys("kmeans++", epochs=2)])
    """

    method: Any
    epochs: int
    freeze: bool
    submodule: str | None
    options: dict[str, Any]

    def __init__(
        self,
        method: Any = None,
        *,
        epochs: int = 1,
        freeze: bool = True,
        submodule: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.method, self.epochs, self.freeze, self.submodule, self.options = method, epochs, freeze, submodule, options
        self.reports: dict[str, KeyReport] = {}

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        for name, module in bottlenecks(pl_module, self.submodule).items():
            if module.keys_frozen or (module.keys_initialised and self.method is None):
                continue
            options = {"epochs": self.epochs, **self.options}
            self.reports[name] = module.init_keys(trainer.train_dataloader, self.method, **options)
            if self.freeze:
                module.freeze_keys()


class FreezeKeys(Callback):
    """Keys stop learning when epoch number ``epoch`` begins.

    Args:
        epoch: counted from 0.
        submodule: the name of the one module; None for all.
    Examples:
        >>> from kvb.integrations.lightning import FreezeKeys, InitKeys
        >>> trainer = lightning.pytorch.Trainer(logger=False, callbacks=[InitKeys(freeze=False), FreezeKeys(epoch=2)])
    """

    epoch: int
    submodule: str | None

    def __init__(self, epoch: int, *, submodule: str | None = None) -> None:
        super().__init__()
        self.epoch, self.submodule = epoch, submodule

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if trainer.current_epoch >= self.epoch:
            for module in bottlenecks(pl_module, self.submodule).values():
                if not module.keys_frozen:
                    module.freeze_keys()


class LogUsage(Callback):
    """At the end of every training epoch, log how the keys are used, as ``<module>/perplexity`` and so on.

    Logged are the mean over codebooks of ``perplexity()``, the share of pairs without hits in ``usage()``
    (``unused_pairs``) and their number (``dead_codes``): those counted with frozen keys, or the moving averages while
    keys learn. Where an ``InitKeys`` of the same trainer initialised the keys, their ``inertia`` then, too.

    Args:
        submodule: the name of the one module; None for all.
        pictures: give the loggers that take figures, TensorBoard's for one, those of ``kvb.plots`` after every so many
            epochs; 0 for never. Needs matplotlib.
        options: of Lightning's ``log``: ``sync_dist=``, ``logger=``, ``prog_bar=``.
    Examples:
        >>> from kvb.integrations.lightning import LogUsage
        >>> trainer = lightning.pytorch.Trainer(logger=False, callbacks=[LogUsage(prog_bar=True)])
    """

    submodule: str | None
    pictures: int
    options: dict[str, Any]

    def __init__(self, *, submodule: str | None = None, pictures: int = 0, **options: Any) -> None:
        super().__init__()
        self.submodule, self.options = submodule, options
        self.pictures = pictures and validation.positive_int("pictures", pictures)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        reports: dict[str, KeyReport] = {}
        for callback in trainer.callbacks:
            if isinstance(callback, InitKeys):
                reports |= callback.reports
        for name, module in bottlenecks(pl_module, self.submodule).items():
            dead = module.usage() == 0
            figures = {
                "perplexity": module.perplexity().mean(),
                "unused_pairs": dead.float().mean(),
                "dead_codes": dead.sum().float(),
                **({"inertia": reports[name].inertia} if name in reports else {}),
            }
            pl_module.log_dict({f"{name}/{figure}": value for figure, value in figures.items()}, **self.options)
            if self.pictures and trainer.is_global_zero and (trainer.current_epoch + 1) % self.pictures == 0:
                from kvb.integrations.tensorboard import log_pictures  # needs matplotlib

                for writer in (logger.experiment for logger in trainer.loggers):
                    if hasattr(writer, "add_figure"):
                        log_pictures(writer, module, trainer.global_step, tag=name)


def bottlenecks(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """The outermost bottlenecks and modules around one in a model, by name; or the one of a name.

    Raises:
        ValueError: there is none. TypeError: the module of that name is none.
    Examples:
        >>> from kvb.integrations.lightning import bottlenecks
        >>> model = torch.nn.ModuleDict({"memory": kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)})
        >>> list(bottlenecks(model))
        ['memory']
    """
    kinds = (KeyValueBottleneck, BottleneckWrapper)
    if name is not None:
        module = model.get_submodule(name)
        if not isinstance(module, kinds):
            raise TypeError(f"expected submodule={name!r} to be a bottleneck of kvb, got {type(module).__name__}")
        return {name: module}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, kinds) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path or "bottleneck"] = module
    if not found:
        raise ValueError(f"{type(model).__name__} holds no bottleneck of kvb")
    return found
