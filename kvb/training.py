"""One step of training on codes in one operator: reads and writes only the rows that the batch fetches.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 4 and the recipe of the
authors' experiments: mean vote of the codebooks, label smoothing, clipped SGD without momentum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvb import collectives, ops, validation  # noqa: F401  (importing ops registers the operators)
from kvb.reference import values as reference


class SGDStep(NamedTuple):
    """What ``sgd_step`` returns about the batch before the step; float32, or float64 for float64 values.

    Examples:
        >>> step = kvb.training.sgd_step(torch.zeros(4, 16, 10), torch.randint(16, (8, 4)), torch.randint(10, (8,)))
        >>> round(step.loss.item(), 4), step.logits.shape  # ln 10: nothing is known yet
        (2.3026, torch.Size([8, 10]))
    """

    loss: Tensor  # []
    norm: Tensor  # []: of the gradient, before clipping
    logits: Tensor  # [B, V]


@torch.no_grad()
def sgd_step(
    values: Tensor,
    codes: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    lr: float = 0.3,
    max_norm: float | None = 1.0,
    label_smoothing: float = 0.1,
    process_group: collectives.Group = False,
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
        mask: bool [B, *shape], True where a position votes, on all ranks of topk; a sample without any teaches nothing.
        lr: the learning rate, >= 0.
        max_norm: the largest norm of the gradient, > 0; None does not clip.
        label_smoothing: in [0, 1].
        process_group: who steps on all batches together: None the default group, False none; a DTensor's mesh says it.
    Returns:
        an ``SGDStep``: loss and gradient norm, of all processes, and logits of this one, as they were before the step.
    Raises:
        TypeError: values that are not floating-point, codes or targets that are not integers, a mask that is not bool.
        ValueError: shapes that disagree, values that are not contiguous, or a number out of its range. IndexError: a
        code outside [0, K) or a target outside [0, V). RuntimeError: devices differ.
    Examples:
        >>> step = kvb.training.sgd_step(values := torch.zeros(2, 3, 2), torch.tensor([[0, 2]]), torch.tensor([1]))
        >>> values.any(-1).tolist()  # the rows that were fetched have moved
        [[True, False, False], [False, False, True]]
    """
    validation.floating("sgd_step", "values", values)
    validation.shape("values", values, "C K V", (None, None, None))
    if not values.is_contiguous():
        raise ValueError(f"expected contiguous values, got strides {values.stride()}; call values.contiguous() first")
    validation.integer("sgd_step", "codes", codes)
    validation.codes(codes, values.shape[0])
    validation.integer("sgd_step", "targets", targets)
    validation.shape("targets", targets, "B", (codes.shape[0],))
    mask = None if mask is None else _of_ranks(mask, codes)
    for name, tensor in (("codes", codes), ("targets", targets), ("mask", codes if mask is None else mask)):
        validation.same_device(name, tensor, "values", values)
    limit = _limit(lr, max_norm, label_smoothing)
    codes, targets, mask, own = _of_all(values, codes, targets.to(torch.int64), mask, process_group)
    flat = codes[:, None] if codes.dim() == 2 else codes.flatten(2).transpose(1, 2)
    step = _step(values, flat, targets, mask, lr, limit, label_smoothing)
    return step if own is None else step._replace(logits=step.logits[own])


def _limit(lr: float, max_norm: float | None, label_smoothing: float) -> float:
    """The largest norm, infinite for None, where all three numbers are in their range."""
    validation.number("lr", lr, 0.0, math.inf)
    limit = math.inf if max_norm is None else validation.number("max_norm", max_norm, 0.0, math.inf, open_low=True)
    if validation.number("label_smoothing", label_smoothing, 0.0, math.inf) > 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    return limit


def _of_all(
    values: Tensor, codes: Tensor, targets: Tensor, mask: Tensor | None, group: collectives.Group
) -> tuple[Tensor, Tensor, Tensor | None, slice | None]:
    """Codes, targets and mask of all processes, and which are this one's; None where there is no other."""
    if _is_split(values) or collectives.world(group) == 1:
        return codes, targets, mask, None
    K = values.shape[1]
    within = torch.where((codes >= 0) & (codes < K), codes, -1)  # sent in fewer bytes, others could look right
    sent = [collectives.as_codes(within, K), targets, *([] if mask is None else [mask])]
    found = collectives.parts(sent, group)
    begin = sum(map(len, found[1][: collectives.rank(group)]))
    all_codes, all_targets, *masks = map(torch.cat, found)
    return all_codes, all_targets, masks[0] if masks else None, slice(begin, begin + len(targets))


def _of_ranks(mask: Tensor, codes: Tensor) -> Tensor:
    """The mask [B, *shape] of codes [B, C, (T), *shape], for every rank if there are any."""
    ranked = codes.dim() - validation.tensor("sgd_step", "mask", mask).dim() > 1
    validation.positions("sgd_step", mask, (codes.shape[0], *codes.shape[2 + ranked :]))
    return mask[:, None].expand(-1, *codes.shape[2:]) if ranked else mask


def _step(
    values: Tensor,
    indices: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    lr: float,
    max_norm: float,
    label_smoothing: float,
) -> SGDStep:
    """The step for indices [B, S, C], at the positions [B, *shape] that count; None for all."""
    counted = None if mask is None else mask.reshape(indices.shape[:2])
    if _is_split(values):
        from kvb.distributed.steps import sgd_step_  # with DTensor, which only those who have one need to import

        return SGDStep(*sgd_step_(values, indices, targets, counted, lr, max_norm, label_smoothing))
    if counted is None:
        return SGDStep(*torch.ops.kvb.sgd_step_(values, indices, targets, lr, max_norm, label_smoothing))
    exact = torch.promote_types(values.dtype, torch.float32)
    votes = torch.ops.kvb.gather(values, indices, "mean", "bscv").to(exact)
    voters = counted.sum(1, keepdim=True).clamp(min=1)
    logits = torch.where(counted[..., None], votes, 0).sum(1) / voters
    loss, grad = reference.cross_entropy(logits, targets, label_smoothing)
    # Padding has the index 0 and a gradient of zero, which keeps the bits of that row.
    spread = torch.where(counted[..., None], (grad / voters)[:, None], 0)
    rows, grads, count = torch.ops.kvb.gather_backward_rows(spread, indices, values.shape[1], "mean")
    norm = reference.clipped_step_(values, rows, grads, count, lr, max_norm)
    return SGDStep(loss, norm, logits)


def _is_split(values: Tensor) -> bool:
    """Whether other processes have parts of the values, a DTensor."""
    return hasattr(values, "device_mesh")
