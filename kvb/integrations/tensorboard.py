"""How keys are used, for TensorBoard: numbers, a histogram and pictures."""

from __future__ import annotations

from typing import Any

from kvb import plots


def log_usage(writer: Any, module: Any, step: int | None = None, *, tag: str = "bottleneck") -> None:
    """Write how the keys of a module are used now, as ``<tag>/perplexity`` and so on.

    The mean over codebooks of ``perplexity()``, the share of pairs without hits in ``usage()`` (``unused_pairs``) and
    their number (``dead_codes``), and a histogram of all hits over an equal share (``usage``).

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar`` and ``add_histogram``.
        module: a ``KeyValueBottleneck``, or a module around one.
        step: the global step, of which later ones draw a curve.
        tag: the name before the slash.
    Raises:
        TypeError: a writer without these methods.
    """
    _require(writer, "add_scalar", "add_histogram")
    shares = module.usage()
    dead = shares == 0
    numbers = {"perplexity": module.perplexity().mean(), "unused_pairs": dead.float().mean(), "dead_codes": dead.sum()}
    for name, number in numbers.items():
        writer.add_scalar(f"{tag}/{name}", float(number), step)
    writer.add_histogram(f"{tag}/usage", (shares * shares.shape[1]).flatten().cpu(), step)


def log_pictures(writer: Any, module: Any, step: int | None = None, *, tag: str = "bottleneck") -> None:
    """Write the pictures of ``kvb.plots``: ``<tag>/values``, and where hits were counted usage, lorenz and key_map.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_figure``.
        module, step, tag: as for ``log_usage``.
    Raises:
        TypeError: a writer without that method.
    """
    _require(writer, "add_figure")
    counted = (plots.usage, plots.lorenz, plots.key_map) if bool(module.usage().any()) else ()
    for draw in (*counted, plots.values):
        writer.add_figure(f"{tag}/{draw.__name__}", draw(module).figure, step)


def _require(writer: Any, *methods: str) -> None:
    if missing := [method for method in methods if not hasattr(writer, method)]:
        raise TypeError(
            f"writer must be a torch.utils.tensorboard.SummaryWriter, got {type(writer).__name__} without {missing[0]}"
        )
