"""Pictures of a bottleneck: which keys are used, where they lie, what their values say, what classes share.

Every function draws into ``axes``, or into those of a new figure, and returns them. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kvb import validation
from kvb.modules.bottleneck import KeyValueBottleneck

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#767676"  # of Okabe and Ito's palette
_NAMED = 30  # classes whose names fit along an axis
_WRITTEN = 12  # classes whose numbers fit into a matrix


def usage(bottleneck: Any, axes: Axes | None = None) -> Axes:
    """How often pairs are fetched: a histogram of ``usage() * K`` over all pairs, where 1 is an equal share.

    Args:
        bottleneck: a ``KeyValueBottleneck``, or a module around one.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> _ = bottleneck.train()(torch.randn(100, 4, 8))  # which counts hits
        >>> kvb.plots.usage(bottleneck).figure.savefig("usage.png")
    """
    shares = _shares(bottleneck)
    axes = _axes(axes)
    K = shares.shape[1]
    relative = (shares * K).flatten()
    axes.hist(relative.tolist(), bins=40, color=_BLUE)
    axes.axvline(1, color=_GREY, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("hits of a pair, over an equal share")
    axes.set_ylabel("pairs")
    axes.set_title(f"{(relative == 0).float().mean():.1%} of all pairs without a hit")
    return axes


def lorenz(bottleneck: Any, axes: Axes | None = None) -> Axes:
    """The Lorenz curve of hits: the share of hits that the least used pairs get, a line per codebook and their mean.

    The straight line stands for equal use; the title names the mean Gini coefficient, 0 for equal use.

    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> _ = bottleneck.train()(torch.randn(100, 4, 8))  # which counts hits
        >>> kvb.plots.lorenz(bottleneck).figure.savefig("lorenz.png")
    """
    shares = _shares(bottleneck).sort(-1).values.cumsum(-1)
    curves = torch.nn.functional.pad(shares, (1, 0))
    axes = _axes(axes)
    places = torch.linspace(0, 1, curves.shape[1])
    for curve in curves[:64]:
        axes.plot(places.tolist(), curve.tolist(), color=_BLUE, alpha=0.2, linewidth=0.8)
    axes.plot(places.tolist(), curves.mean(0).tolist(), color=_BLUE, linewidth=2)
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    axes.set_xlabel("share of pairs, least used first")
    axes.set_ylabel("share of hits")
    axes.set_title(f"Gini coefficient {1 - 2 * torch.trapezoid(curves, places).mean():.2f}")
    return axes


def key_map(bottleneck: Any, codebook: int = 0, axes: Axes | None = None) -> Axes:
    """The keys of a codebook on the plane of their largest spread; the area of a point is its share of hits.

    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> _ = bottleneck.train()(torch.randn(100, 4, 8))  # which counts hits
        >>> kvb.plots.key_map(bottleneck).figure.savefig("key_map.png")
    """
    own, shares = _inner(bottleneck), _shares(bottleneck)
    keys = own.keys[_codebook(own, codebook)].detach().float().cpu()
    centred = keys - keys.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    places = torch.nn.functional.pad(centred @ directions.T, (0, 2 - len(directions)))
    size = shares[codebook] * len(keys) * 30
    axes = _axes(axes)
    unused = size == 0
    x, y = places[~unused].T.tolist()
    axes.scatter(x, y, size[~unused].tolist(), _BLUE, alpha=0.6, linewidths=0)
    x, y = places[unused].T.tolist()
    axes.scatter(x, y, 12, _ORANGE, marker="x", linewidths=0.8, label="without hits")
    if bool(unused.any()):
        axes.legend()
    axes.set_title(f"keys of codebook {codebook}; area: share of hits")
    axes.set_aspect("equal", "datalim")  # distances on the page are distances
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def values(bottleneck: Any, codebook: int = 0, axes: Axes | None = None, names: Sequence[str] | None = None) -> Axes:
    """The values of a codebook [K, V] as a heat map, pairs in the order of their largest entry, the winning class.

    The left axis names the winning class of each block of pairs, as far as there are few.

    Args:
        names: of the V entries, where they are classes.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> kvb.plots.values(bottleneck).figure.savefig("values.png")
    """
    own = _inner(bottleneck)
    table = own.values[_codebook(own, codebook)].detach().float().cpu()
    K, V = table.shape
    _require_names(names, V)
    # V where no entry is larger than the others.
    winner = torch.where(table.amax(-1) > table.amin(-1), table.argmax(-1), V)
    order = (winner * 2.0 - torch.nn.functional.softmax(table, -1).amax(-1)).argsort()
    limit = table.abs().max().item() or 1.0
    axes = _axes(axes)
    image = axes.imshow(table[order].tolist(), aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.figure.colorbar(image, ax=axes)
    axes.set_xlabel("entry of the value" if names is None else "class")
    axes.set_ylabel("pairs, by their largest entry")
    axes.set_yticks([])
    if V <= _NAMED:
        shown = [*_shown(names, V), "none"]
        axes.set_xticks(range(V), shown[:V], rotation=0 if names is None else 90)
        won, sizes = winner.unique(return_counts=True)
        ends = sizes.cumsum(0)
        axes.set_yticks((ends - sizes / 2 - 0.5).tolist(), [shown[entry] for entry in won.tolist()])
        axes.tick_params("y", length=0)
        for end in ends[:-1].tolist():
            axes.axhline(end - 0.5, color=_GREY, linewidth=0.5)
    axes.set_title(f"values of codebook {codebook}: {K} x {V}")
    return axes


def overlap(shared: Tensor, axes: Axes | None = None, names: Sequence[str] | None = None) -> Axes:
    """What classes share, from ``kvb.unlearning.overlap`` [L, L]: 1 for equal use of pairs, 0 for none in common.

    The diagonal, what a class shares with itself, stays white, so that colours tell the others apart.
    Examples:
        >>> shared = kvb.unlearning.overlap(torch.randint(9, (3, 4, 16)))
        >>> kvb.plots.overlap(shared, names=["cat", "dog", "cow"]).figure.savefig("overlap.png")
    """
    return _matrix(shared, "shared", "share of fetched pairs in common", axes, names, diagonal=False)


def accuracies(matrix: Tensor, axes: Axes | None = None, names: Sequence[str] | None = None) -> Axes:
    """An accuracy matrix [T, T]: row i after learning task i, column j of task j; NaN stays white.

    Examples:
        >>> matrix = torch.tensor([[0.9, torch.nan], [0.8, 0.7]])
        >>> kvb.plots.accuracies(matrix).figure.savefig("accuracies.png")
    """
    axes = _matrix(matrix, "matrix", "test accuracy", axes, names, diagonal=True)
    axes.set_xlabel("tested on task")
    axes.set_ylabel("after learning task")
    return axes


def _matrix(
    matrix: Tensor, name: str, title: str, axes: Axes | None, names: Sequence[str] | None, *, diagonal: bool
) -> Axes:
    validation.tensor("plots", name, matrix)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected {name} of shape (L, L), got {tuple(matrix.shape)}")
    _require_names(names, len(matrix))
    axes = _axes(axes)
    numbers, highest = matrix.detach().float().cpu(), 1.0
    if not diagonal:
        numbers = numbers.masked_fill(torch.eye(len(matrix), dtype=torch.bool), torch.nan)
        highest = max([1e-6, *numbers[numbers.isfinite()].tolist()])
    image = axes.imshow(numbers.tolist(), cmap="viridis", vmin=0, vmax=highest)
    axes.figure.colorbar(image, ax=axes)
    axes.set_title(title)
    if len(matrix) <= _WRITTEN:
        for row, column in numbers.isfinite().nonzero().tolist():
            number = numbers[row, column].item()
            dark = number < 0.6 * highest
            axes.text(
                column, row, f"{number:.2f}", ha="center", va="center", size=8, color="white" if dark else "black"
            )
    if len(matrix) <= _NAMED:
        shown = _shown(names, len(matrix))
        axes.set_xticks(range(len(matrix)), shown, rotation=0 if names is None else 90)
        axes.set_yticks(range(len(matrix)), shown)
    return axes


def _shown(names: Sequence[str] | None, count: int) -> list[str]:
    return [str(number) for number in range(count)] if names is None else list(names)


def _axes(axes: Axes | None) -> Axes:
    return Figure(figsize=(5, 4), layout="constrained").subplots() if axes is None else axes


def _inner(bottleneck: Any) -> KeyValueBottleneck:
    inner = getattr(bottleneck, "bottleneck", bottleneck)
    if not isinstance(inner, KeyValueBottleneck):
        raise TypeError(f"expected a KeyValueBottleneck or a module around one, got {type(bottleneck).__name__}")
    return inner


def _shares(bottleneck: Any) -> Tensor:
    """``usage()`` [C, K], in the host's memory."""
    own = _inner(bottleneck)
    shares = own.usage().detach().float().cpu()
    if not bool(shares.any()):
        raise ValueError(
            "nothing was counted yet: run batches in training mode with frozen keys, or load a module that has counts"
        )
    return shares


def _codebook(own: KeyValueBottleneck, codebook: int) -> int:
    if not 0 <= codebook < own.num_codebooks:
        raise ValueError(f"codebook must be in [0, {own.num_codebooks}), got {codebook}")
    return codebook


def _require_names(names: Sequence[str] | None, count: int) -> None:
    if names is not None and len(names) != count:
        raise ValueError(f"expected {count} names, got {len(names)}")
