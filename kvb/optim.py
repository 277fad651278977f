"""Optimizers that move a row of a value table only when it has a gradient, and clipping for sparse gradients.

A dense optimizer with momentum, weight decay or Adam's averages keeps moving rows that are no longer fetched, and so
forgets what they learned; ``audit`` finds such optimizers.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3: an update is local to
the pairs that were fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvb import _torch, ops, validation
from kvb.optim_audit import Finding, audit
from kvb.optim_clip import clip_grad_norm_
from kvb.optim_gradients import flat, part_of, require_whole_rows, touched_rows
from kvb.optim_groups import param_groups
from kvb.optim_growth import grow
from kvb.optim_rows import RowCounts, keep_rows_, select_rows

__all__ = [
    "Finding",
    "RowCounts",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "RowwiseSGD",
    "audit",
    "clip_grad_norm_",
    "grow",
    "keep_rows_",
    "param_groups",
    "select_rows",
]


class _Rowwise(torch.optim.Optimizer):
    """What the row-wise optimizers share: which rows move, their state, and weight decay.

    ``_move`` works on the touched rows of a table and on ordinary parameters alike.
    """

    def __init__(self, params: Any, rowwise: bool | None, **defaults: Any) -> None:
        if not (rowwise is None or isinstance(rowwise, bool)):
            raise TypeError(f"rowwise must be True, False or None, got {rowwise!r}")
        super().__init__(params, {**defaults, "rowwise": rowwise})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; checks the options of the group."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        infinity = float("inf")
        for name in ("lr", "weight_decay"):
            if not isinstance(group[name], Tensor):
                validation.number(name, group[name], 0.0, infinity)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``, without what PyTorch does around it, which takes longer."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    @_torch.hooked_where_watched
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure computes the loss and its gradients first, and its loss is returned.

        Raises:
            ValueError: a sparse gradient with a sparse last axis, or a table that is not contiguous.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    grad = param.grad
                    if grad is not None:
                        self._step(param, grad, group)
        return loss

    def _step(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        by_row = param.dim() == 3 if group["rowwise"] is None else group["rowwise"]
        grad = part_of(grad, like=param)
        rows_move = (by_row or grad.is_sparse) and param.dim() > 1
        if rows_move:
            require_whole_rows(param)
        memory = {name: part_of(kept) for name, kept in self._memory(param, group, rows=rows_move).items()}
        param = part_of(param)
        if not rows_move:
            self._move(param, grad, memory, group)
            return
        if not param.is_contiguous():
            raise ValueError(f"expected a contiguous table of values, got strides {param.stride()}; call contiguous()")
        places, grads = touched_rows(param, grad, self._zeros_move(group))
        self._move_rows(param, places, grads, memory, group)

    def _move_rows(
        self, param: Tensor, places: Tensor, grads: Tensor, memory: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """``_move`` some rows of a table [*, V]."""
        rows, _ = flat(places, param.shape)
        tables = [table.view(-1, table.shape[-1]) for table in (param, *memory.values())]
        parts = [table.index_select(0, rows) for table in tables]
        self._move(parts[0], grads, dict(zip(memory, parts[1:], strict=True)), group)
        for whole, part in zip(tables, parts, strict=True):
            whole.index_copy_(0, rows, part)

    def _memory(self, param: Tensor, group: dict[str, Any], *, rows: bool) -> dict[str, Tensor]:
        """The state of a parameter, made at its first step; ``step`` counts each row's own steps."""
        state = self.state[param]
        if not state:
            state.update(self._fresh(param, group))
            if "step" in state:
                each = param[..., :1] if rows else part_of(param).new_zeros(())
                state["step"] = torch.zeros_like(each, dtype=torch.int32, memory_format=torch.contiguous_format)
        elif "step" in state and state["step"].device != param.device:
            state["step"] = state["step"].to(param.device)  # load_state_dict leaves it where it was saved
        return dict(state)

    def _zeros_move(self, group: dict[str, Any]) -> bool:
        """Whether ``_move`` changes anything where the gradient is zero."""
        return bool(group["weight_decay"] != 0)

    def _fresh(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _move(self, param: Tensor, grad: Tensor, memory: dict[str, Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


def _decay(param: Tensor, group: dict[str, Any]) -> None:
    if group["weight_decay"] != 0:
        param.mul_(1 - group["lr"] * group["weight_decay"])


class RowwiseSGD(_Rowwise):
    """Stochastic gradient descent: the optimizer of the paper, for dense and row-sparse gradients.

    Equivalent to ``rows.mul_(1 - lr * weight_decay).sub_(lr * grad)`` for the rows whose gradient is not zero, and to
    ``torch.optim.SGD(lr=lr, weight_decay=weight_decay)`` for ordinary parameters. There is no momentum: it would move
    rows after their last gradient.

    Args:
        params: parameters or groups, as ``torch.optim`` takes them; ``param_groups`` makes groups of a model.
        lr: the learning rate, >= 0; the paper's is 0.3.
        weight_decay: decoupled, >= 0, on touched rows only: decaying all rows would forget.
        rowwise: whether the parameters are tables [..., V] of rows. None treats those with three axes, [C, K, V], as
            tables and all others as ordinary parameters; put a Conv1d weight, which has three axes too, into a group
            with ``rowwise=False``. A sparse gradient always moves single rows.
    State:
        none.
    Raises:
        TypeError, ValueError: an option out of its range.
    Source: Träuble et al., ICML 2023 (arXiv:2207.11240), appendix on training.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> optimizer = kvb.optim.RowwiseSGD([bottleneck.values], lr=0.1)
        >>> bottleneck(torch.randn(5, 4, 8), pool="mean").square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 0.3, *, weight_decay: float = 0.0, rowwise: bool | None = None
    ) -> None:
        super().__init__(params, rowwise, lr=lr, weight_decay=weight_decay)

    def _fresh(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _move(self, param: Tensor, grad: Tensor, memory: dict[str, Tensor], group: dict[str, Any]) -> None:
        _decay(param, group)
        param.sub_(grad * group["lr"])

    def _move_rows(
        self, param: Tensor, places: Tensor, grads: Tensor, memory: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """The same to the last bit, on the CPU in one pass over the rows."""
        one_pass = param.is_cpu and param.dtype == grads.dtype and group["weight_decay"] == 0
        if one_pass and not isinstance(group["lr"], Tensor):
            ops.move_rows_(param, places, grads, group["lr"])
        else:
            super()._move_rows(param, places, grads, memory, group)


class RowwiseAdagrad(_Rowwise):
    """Adagrad, whose sums of squares grow for touched rows only.

    Equivalent to ``torch.optim.Adagrad(lr=lr, eps=eps)`` on the rows whose gradient is not zero, with decoupled weight
    decay on them. Each element has its own sum, as in ``torch.optim.Adagrad``.

    Args:
        params, lr, weight_decay, rowwise: as for ``RowwiseSGD``.
        initial_accumulator_value: the initial value of the sums, >= 0.
        eps: added to their roots, > 0.
    State:
        ``sum``, the shape of the parameter.
    Raises:
        TypeError, ValueError: an option out of its range.
    Source: Duchi et al., Adaptive Subgradient Methods, JMLR 12, 2011.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> optimizer = kvb.optim.RowwiseAdagrad([bottleneck.values], lr=0.1)
        >>> bottleneck(torch.randn(5, 4, 8), pool="mean").square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        rowwise: bool | None = None,
    ) -> None:
        options = {"initial_accumulator_value": initial_accumulator_value, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, rowwise, lr=lr, **options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        validation.number("initial_accumulator_value", group["initial_accumulator_value"], 0.0, float("inf"))
        validation.number("eps", group["eps"], 0.0, float("inf"), open_low=True)

    def _fresh(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        start = group["initial_accumulator_value"]
        # Pages of zeros take no memory until a row is touched.
        return {"sum": torch.full_like(param, start) if start else torch.zeros_like(param)}

    def _move(self, param: Tensor, grad: Tensor, memory: dict[str, Tensor], group: dict[str, Any]) -> None:
        _decay(param, group)
        memory["sum"].addcmul_(grad, grad)
        param.sub_(grad / memory["sum"].sqrt().add_(group["eps"]) * group["lr"])


class RowwiseAdam(_Rowwise):
    """Adam with averages and step counts per row: only a gradient moves them.

    Equivalent to one ``torch.optim.AdamW`` per row, which steps when the gradient of its row is not zero; and to
    ``torch.optim.AdamW`` for ordinary parameters. Unlike ``torch.optim.SparseAdam`` it also takes dense gradients, and
    corrects the bias of a row by its own steps: a row first touched late starts with a step of ``lr``, not of 3 ``lr``.

    Args:
        params, lr, weight_decay, rowwise: as for ``RowwiseSGD``.
        betas: of the averages of the gradient and of its square, both in [0, 1).
        eps: added to the root of the latter, > 0.
    State:
        ``exp_avg``, ``exp_avg_sq`` of the shape of the parameter; ``step`` int32 [..., 1], or [] if ordinary.
    Raises:
        TypeError, ValueError: an option out of its range.
    Source: Kingma and Ba, Adam, ICLR 2015 (arXiv:1412.6980); Loshchilov and Hutter, Decoupled Weight Decay
    Regularization, ICLR 2019 (arXiv:1711.05101).
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
        >>> optimizer = kvb.optim.RowwiseAdam([bottleneck.values], lr=0.1)
        >>> bottleneck(torch.randn(5, 4, 8), pool="mean").square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rowwise: bool | None = None,
    ) -> None:
        super().__init__(params, rowwise, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        validation.number("eps", group["eps"], 0.0, float("inf"), open_low=True)
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
        for i, beta in enumerate(group["betas"]):
            validation.number(f"betas[{i}]", beta, 0.0, 1.0)

    def _zeros_move(self, group: dict[str, Any]) -> bool:
        return True

    def _fresh(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"step": None, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    def _move(self, param: Tensor, grad: Tensor, memory: dict[str, Tensor], group: dict[str, Any]) -> None:
        _decay(param, group)
        first, second = group["betas"]
        step = memory["step"].add_(1).double()
        average = memory["exp_avg"].lerp_(grad, 1 - first)
        square = memory["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        root = square.sqrt().div_((1 - second**step).sqrt_().to(param.dtype)).add_(group["eps"])
        param.sub_(average / root * (group["lr"] / (1 - first**step)).to(param.dtype))
