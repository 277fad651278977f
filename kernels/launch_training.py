"""One step of training on codes, ``sgd_step_``: the launches of ``gather`` and its gradient, and the rows moved by it.

What lies between them, the loss of [B, V] logits, is small and left to PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvb._torch import assert_async
from kvb.kernels import scatter
from kvb.kernels.device import ceil_div, power_of_two, require
from kvb.kernels.launch_values import gather, gather_backward_rows
from kvb.kernels.launcher import run

_ELEMENTS, _COLUMNS, _MOST_ROWS = 2048, 128, 256  # of a tile of rows that move


def sgd_step_(
    values: Tensor, indices: Tensor, targets: Tensor, lr: float, max_norm: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of clipped SGD on values [C, K, V], in place; loss [], gradient norm [] and logits [B, V] before it."""
    require(values.is_contiguous(), lambda: f"expected contiguous values, got strides {values.stride()}")
    fetched = gather(values, indices, "mean", "bscv")
    B, S, V = fetched.shape
    require(
        targets.shape == (B,) and targets.dtype == torch.int64 and targets.device == values.device,
        lambda: (
            f"expected targets torch.int64 {(B,)} on {values.device}, "
            f"got {targets.dtype} {tuple(targets.shape)} on {targets.device}"
        ),
    )
    assert_async(((targets >= 0) & (targets < V)).all(), f"a target is out of bounds for {V} classes")
    exact = torch.promote_types(values.dtype, torch.float32)
    logits = fetched.to(exact).mean(1)
    shares = logits.log_softmax(-1)
    hot = torch.arange(V, device=targets.device) == targets[:, None]
    fit = hot.to(exact) * (1 - label_smoothing) + label_smoothing / V
    loss = -(fit * shares).sum(-1).mean()
    grad = (shares.exp() - fit) / B / S
    rows, grads, _ = gather_backward_rows(grad[:, None].expand(B, S, V), indices, values.shape[1], "mean")
    norm = grads.double().square().sum().sqrt()
    step = lr * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    rows = torch.where(norm.isfinite(), rows, -1)  # a gradient that is not finite moves nothing
    if rows.numel():
        columns = min(_COLUMNS, power_of_two(V))
        size = min(_MOST_ROWS, _ELEMENTS // columns)
        run(
            scatter.move_rows,
            (ceil_div(len(rows), size), ceil_div(V, columns)),
            table=values,
            rows=rows,
            grads=grads,
            step=step,
            count=len(rows),
            V=V,
            BLOCK_R=size,
            BLOCK_V=columns,
        )
    return loss, norm.to(exact), logits
