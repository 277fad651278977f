"""The value tables of a model, and groups of parameters for an optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kvb import validation


def value_tables(model: nn.Module) -> dict[str, Tensor]:
    """The value tables of a model by name: parameters ``values`` [C, K, V], as in kvb and the published packages.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = model.named_parameters()
    return {name: param for name, param in named if name.rpartition(".")[2] == "values" and param.dim() == 3}


def param_groups(model: nn.Module, lr: float, values_lr: float | None = None) -> list[dict[str, Any]]:
    """The parameters of a model in two groups for an optimizer: value tables, and the rest, if any.

    Value tables get ``rowwise=True`` and neither weight decay nor momentum, whatever the optimizer's defaults are. So
    the groups suit ``torch.optim`` as well, except for Adam's averages, which need ``RowwiseAdam``.

    Equivalent to ``[{"params": rest, "lr": lr}, {"params": [bottleneck.values], "lr": values_lr, "rowwise": True,
    "weight_decay": 0.0, "momentum": 0.0}]``.

    Args:
        model: any module that holds one ``KeyValueBottleneck`` or more.
        lr: of the rest.
        values_lr: of the value tables; ``lr`` by default.
    Returns:
        one or two groups, without parameters that require no gradient.
    Raises:
        TypeError: not a module. ValueError: a rate below 0, or a model without a value table that learns.
    Examples:
        >>> model = torch.nn.Sequential(kvb.KeyValueBottleneck(4, 16, 8, 10), torch.nn.Linear(10, 2))
        >>> optimizer = kvb.optim.RowwiseAdam(kvb.optim.param_groups(model, lr=1e-3, values_lr=0.03))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.03]
    """
    validation.number("lr", lr, 0.0, float("inf"))
    rate = lr if values_lr is None else validation.number("values_lr", values_lr, 0.0, float("inf"))
    tables = [table for table in value_tables(model).values() if table.requires_grad]
    if not tables:
        raise ValueError(
            f"expected a model with a KeyValueBottleneck whose values require a gradient, got {type(model).__name__} "
            "without one; its parameters need no groups"
        )
    known = set(map(id, tables))
    rest = [param for param in model.parameters() if param.requires_grad and id(param) not in known]
    still = {"rowwise": True, "weight_decay": 0.0, "momentum": 0.0}
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr}] if rest else []
    return [*groups, {"params": tables, "lr": rate, **still}]
