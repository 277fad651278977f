"""One step of training on codes in one operator: reads and writes only the rows that the batch fetches.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 4 and the recipe of the
authors' experiments: mean vote of the codebooks, label smoothing, clipped SGD without momentum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvb import ops, validation  # noqa: F401  (importing ops registers the operators)


class SGDStep(NamedTuple):
    """What ``sgd_step`` returns about the batch before the step; float32, or float64 for float64 values."""

    loss: Tensor  # []
    norm: Tensor  # []: of the gradient, before clipping
    logits: Tensor  # [B, V]


@torch.no_grad()
def sgd_step(
    values: Tensor,
    codes: Tensor,
    targets: Tensor,
    *,
    lr: float = 0.3,
    max_norm: float | None = 1.0,
    label_smoothing: float = 0.1,
) -> SGDStep:
    """One step of SGD on the values that codes fetch, with the paper's head and loss, in place.

    Equivalent to, within the rounding of float32 and without any table of gradients::

        logits = bottleneck.decode(codes).flatten(1, -2).mean(1)  # every codebook and position votes
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        loss.backward()
        clip_grad_norm_([values], max_norm)
        values -= lr * values.grad

    Rows that no code names keep their bits. The result does not depend on the number of threads.

    Args:
        values: [C, K, V], such as ``bottleneck.values``: contiguous float16, bfloat16, float32 or float64; V classes.
        codes: [B, C, *shape] of any integer dtype, from ``encode`` or a ``CodeDataset``; same device.
        targets: [B] int64 in [0, V).
        lr: the learning rate, >= 0.
        max_norm: the largest norm of the gradient, > 0; None does not clip.
        label_smoothing: in [0, 1].
    Returns:
        an ``SGDStep``: loss, gradient norm and logits, as they were before the step.
    Raises:
        TypeError: values that are not floating-point, codes or targets that are not integers. ValueError: shapes that
        disagree, values that are not contiguous, or a number out of its range. IndexError: a code outside [0, K) or a
        target outside [0, V). RuntimeError: devices differ.
    """
    validation.floating("sgd_step", "values", values)
    validation.shape("values", values, "C K V", (None, None, None))
    if not values.is_contiguous():
        raise ValueError(f"expected contiguous values, got strides {values.stride()}; call values.contiguous() first")
    validation.integer("sgd_step", "codes", codes)
    validation.codes(codes, values.shape[0])
    validation.integer("sgd_step", "targets", targets)
    validation.shape("targets", targets, "B", (codes.shape[0],))
    for name, tensor in (("codes", codes), ("targets", targets)):
        validation.same_device(name, tensor, "values", values)
    infinity = float("inf")
    validation.number("lr", lr, 0.0, infinity)
    limit = infinity if max_norm is None else validation.number("max_norm", max_norm, 0.0, infinity, open_low=True)
    if validation.number("label_smoothing", label_smoothing, 0.0, infinity) > 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    flat = codes[:, None] if codes.dim() == 2 else codes.flatten(2).transpose(1, 2)
    return SGDStep(*torch.ops.kvb.sgd_step_(values, flat, targets.to(torch.int64), lr, limit, label_smoothing))
