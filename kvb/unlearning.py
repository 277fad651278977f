"""Unlearning: which pairs hold what a subset taught, masks of them, and forgetting by no longer fetching them.

A bottleneck keeps what it learned in single pairs, so that taking the pairs of a class away forgets the class: without
training, and with no data but codes of what to forget. ::

    per_class = class_hits(bottleneck, data, num_classes=10)  # [10, C, K], of a CodeDataset or of inputs with labels
    mask = mask_by_activations(per_class[3], share=0.95)
    before = forget(bottleneck, mask)  # class 3 is gone
    bottleneck.mask_pairs(before)  # and is back

There are two ways to apply a mask. ``forget`` takes its pairs out of the search, so that a query fetches the
nearest pair that is left, of another class; ``erase`` leaves the search alone and empties the values. The former
forgets far better: where all that a sample fetches is empty its logits are equal, and their argmax is still a class,
the first. So call ``forget``, and then ``erase`` if the values must not stay in the module either.

A mask changes codes: those cached before ``forget``, a ``CodeDataset`` say, still name masked pairs, and ``decode``
fetches them. Encode again after ``forget``. Cached codes do see ``erase``.

Source: Shah et al., Unlearning via Sparse Representations (arXiv:2311.15268; TMLR 09/2025): unlearning via activations
and via examples. Ours: weighing hits by ``retain_hits``, the mask that always leaves pairs to fetch, ``overlap``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from kvb import items, validation
from kvb.data import CodeDataset
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.samples import cut

__all__ = ["class_hits", "erase", "forget", "hits", "mask_by_activations", "mask_by_examples", "overlap"]

# --- histograms -------------------------------------------------------------------------------------------------------


def hits(bottleneck: KeyValueBottleneck, data: Tensor | CodeDataset | Iterable[Any]) -> Tensor:
    """How often ``data`` fetches each pair. Nothing of the module changes, its counter and its keys included.

    Equivalent to ``torch.stack([codes[:, c].flatten().bincount(minlength=K) for c in range(C)])``, the codes being
    ``bottleneck.encode(inputs)`` for inputs. Integers are codes, floating-point numbers are inputs.

    Args:
        bottleneck: C codebooks of K pairs; that of an encoder is ``model.bottleneck``, its codes ``model.encode(x)``.
        data: codes [N, C, *shape] of any integer dtype or a ``CodeDataset`` of them; inputs [N, C, *shape, D]; or an
            iterable (a DataLoader, say) of either or of (either, labels, ...) items. Inputs are searched with the mask
            of the module; those with NaN or Inf are not counted, as in the module, nor positions that the mask of a
            ``CodeDataset``, or of the batches of one, leaves out.
    Returns:
        [C, K] int64, on the module's device.
    Raises:
        TypeError: a module that is no KeyValueBottleneck, or data of none of these kinds. ValueError: its shape does
        not fit, or it holds no samples. IndexError: a code outside [0, K). RuntimeError: keys that still wait for data.
    Source: Shah et al., arXiv:2311.15268, whose histograms of activations these are.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(1, 3, dim_keys=8, dim_values=10)
        >>> kvb.unlearning.hits(bottleneck, torch.tensor([[0], [2], [2]]))
        tensor([[1, 0, 2]])
    """
    C, K = _pairs("hits", bottleneck)
    total = torch.zeros(C, K, dtype=torch.int64, device=bottleneck.keys.device)
    for codes, counted, _ in _searched("hits", bottleneck, data):
        total += _histograms(codes, counted, torch.zeros_like(codes[:, 0, 0]), 1, K)[0]
    return total


def class_hits(
    bottleneck: KeyValueBottleneck, data: CodeDataset | Iterable[Any], num_classes: int | None = None
) -> Tensor:
    """``hits`` of every class, in one pass: what to forget, what to retain, and how much the classes share.

    Equivalent to ``torch.stack([hits(bottleneck, codes[labels == label]) for label in range(num_classes)])``. The
    hits of all classes but one are ``per_class.sum(0) - per_class[one]``.

    Args:
        bottleneck: C codebooks of K pairs.
        data: a ``CodeDataset`` with labels, or an iterable of (codes or inputs, labels, ...) items; labels [B] are
            integers.
        num_classes: L; None takes the largest label and one.
    Returns:
        [L, C, K] int64, on the module's device.
    Raises:
        as ``hits``; TypeError: labels that are no integers. ValueError: no labels, or one outside [0, num_classes).
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(1, 3, dim_keys=8, dim_values=2)
        >>> data = kvb.CodeDataset(torch.tensor([[0], [2], [2]]), labels=torch.tensor([0, 1, 1]))
        >>> kvb.unlearning.class_hits(bottleneck, data)[1]
        tensor([[0, 0, 2]])
    """
    if num_classes is not None:
        validation.positive_int("num_classes", num_classes)
    C, K = _pairs("class_hits", bottleneck)
    total = torch.zeros(num_classes or 0, C, K, dtype=torch.int64, device=bottleneck.keys.device)
    for codes, counted, labels in _searched("class_hits", bottleneck, data):
        if labels is None:
            raise ValueError("class_hits() needs labels: a CodeDataset with labels, or (inputs, labels, ...) items")
        labels = validation.integer("class_hits", "labels", items.label_tensor(labels))
        validation.shape("labels", labels, "B", (len(codes),))
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or (num_classes is not None and high >= num_classes):
            limit = "num_classes)" if num_classes is None else f"{num_classes})"
            raise ValueError(f"labels must be in [0, {limit}, got {low} to {high}")
        more = max(0, int(high) + 1 - len(total))
        total = torch.cat([total, total.new_zeros(more, C, K)])
        total += _histograms(codes, counted, labels.to(codes.device, torch.int64), len(total), K)
    return total


def _pairs(owner: str, bottleneck: Any) -> tuple[int, int]:
    if not isinstance(bottleneck, KeyValueBottleneck):
        inside = isinstance(getattr(bottleneck, "bottleneck", None), KeyValueBottleneck)
        hint = "; give its attribute bottleneck" if inside else ""
        raise TypeError(f"{owner}(): expected a KeyValueBottleneck, got {type(bottleneck).__name__}{hint}")
    return bottleneck.num_codebooks, bottleneck.key_value_pairs_per_codebook


def _histograms(codes: Tensor, counted: Tensor | None, rows: Tensor, L: int, K: int) -> Tensor:
    """codes [B, C, M], counted [B, C, M] or None for all, rows [B] below L -> [L, C, K]."""
    C = codes.shape[1]
    book = torch.arange(C, device=codes.device)[:, None]
    places = (rows[:, None, None] * C + book) * K + codes
    return torch.bincount(places.flatten() if counted is None else places[counted], minlength=L * C * K).view(L, C, K)


@torch.no_grad()
def _searched(owner: str, bottleneck: KeyValueBottleneck, data: Any) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
    """Batches that are not empty: codes [B, C, M] int64, which of them count (None: all), and labels as they are."""
    found = False
    counted: Tensor | None
    for batch, labels, mask in _batches(owner, data):
        if validation.tensor(owner, "data", batch).is_floating_point():
            codes, counted = _encoded(bottleneck, batch.to(bottleneck.keys.device))
        else:
            codes = _given(owner, bottleneck, batch.to(bottleneck.keys.device))
            counted = None if mask is None else _of_positions(mask.to(codes.device), codes)
        if len(codes):
            found = True
            yield codes.flatten(2) if codes.dim() > 2 else codes[..., None], counted, labels
    if not found:
        raise ValueError("data yielded no samples")


def _of_positions(mask: Tensor, codes: Tensor) -> Tensor:
    """The mask [B, *shape] for each of codes [B, C, (T), *shape]: [B, C, M]."""
    each = mask.view(len(mask), *(1,) * (codes.dim() - mask.dim()), *mask.shape[1:]).expand(codes.shape)
    return each.flatten(2) if codes.dim() > 2 else each[..., None]


def _batches(owner: str, data: Any) -> Iterator[tuple[Any, Any, Tensor | None]]:
    """Codes or inputs, labels and the mask of the positions that count; None where there are none."""
    if isinstance(data, CodeDataset):
        parts = cut(data.codes)
        more = (repeat(None) if one is None else one.split(len(parts[0])) for one in (data.labels, data.mask))
        yield from zip(parts, *more)  # noqa: B905 (there is no end of None)
    elif isinstance(data, Tensor):
        yield from ((part, None, None) for part in cut(validation.tensor(owner, "data", data)))
    elif isinstance(data, Iterable):
        for item in data:
            inputs, mask = items.inputs_of(item), _mask_in(item)
            labels = items.labels_of(item, inputs)
            yield inputs, None if labels is mask else labels, mask
    else:
        raise TypeError(f"data must be a Tensor, a CodeDataset or an iterable of batches, not {type(data).__name__}")


def _mask_in(item: Any) -> Tensor | None:
    """The mask in a batch of a ``CodeDataset``: after the codes, and the labels if there are any."""
    if not isinstance(item, (tuple, list)) or not 2 <= len(item) <= 3:
        return None
    codes, mask = item[0], item[-1]
    both = isinstance(codes, Tensor) and isinstance(mask, Tensor)
    return mask if both and mask.dtype == torch.bool and not codes.is_floating_point() else None


def _encoded(bottleneck: KeyValueBottleneck, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, C, (T), *shape] of inputs, and which of them count, [B, C, M]: finite inputs that found a pair do."""
    codes = bottleneck.encode(x)
    counted = x.isfinite().all(-1)
    if bottleneck.topk > 1:
        counted = counted.unsqueeze(2)
    counted = counted.expand(codes.shape)
    if (present := bottleneck._present()) is not None:
        ranks = present if bottleneck.topk > 1 else present[:, 0]
        counted = counted & ranks.view(*ranks.shape, *[1] * (codes.dim() - 1 - ranks.dim()))
    return codes, counted.flatten(2) if codes.dim() > 2 else counted[..., None]


def _given(owner: str, bottleneck: KeyValueBottleneck, codes: Tensor) -> Tensor:
    validation.integer(owner, "codes", codes)
    validation.codes(codes, bottleneck.num_codebooks)
    K = bottleneck.key_value_pairs_per_codebook
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < K:
        raise IndexError(f"codes must be in [0, {K}), got {int(codes.min())} to {int(codes.max())}")
    return codes.long()


def overlap(per_class: Tensor) -> Tensor:
    """How much two classes share of what they fetch: what forgetting one can cost the other.

    Equivalent to ``torch.minimum(p[:, None], p[None]).sum(-1).mean(-1)`` with ``p = per_class / per_class.sum(-1,
    keepdim=True)``: the intersection of two histograms of a codebook, averaged over codebooks.

    Args:
        per_class: [L, C, K] >= 0, from ``class_hits``.
    Returns:
        [L, L] float64, symmetric: 1 for equal use (the diagonal), 0 for no pair in common or no hits.
    Raises:
        TypeError: no tensor, or complex or boolean numbers. ValueError: other shapes.
    Source: ours; arXiv:2311.15268 leaves this open.
    Examples:
        >>> kvb.unlearning.overlap(torch.tensor([[[4, 0]], [[1, 3]]]))
        tensor([[1.0000, 0.2500],
                [0.2500, 1.0000]], dtype=torch.float64)
    """
    _require_hits("overlap", "per_class", per_class)
    validation.shape("per_class", per_class, "L C K", (None, None, None))
    shares = per_class.double() / per_class.sum(-1, keepdim=True).clamp(min=1)
    return torch.stack([torch.minimum(one, shares).sum(-1).mean(-1) for one in shares])


# --- masks ------------------------------------------------------------------------------------------------------------


def mask_by_activations(
    forget_hits: Tensor,
    n: int | None = None,
    *,
    share: float | None = None,
    retain_hits: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Unlearning via activations: a mask that leaves out the pairs that a forget set fetches most.

    Equivalent to ``mask = torch.ones(C, K, dtype=torch.bool); mask.view(-1)[forget_hits.flatten().topk(n).indices] =
    False``, except for ties, where the lowest place goes first, and for pairs without a hit, which always stay. A
    codebook that would lose every pair keeps its last in this order: something must be fetched.

    Args:
        forget_hits: [C, K] >= 0, ``hits`` of the forget set; the sum of several classes forgets them together.
        n: N_a, how many pairs to leave out over all codebooks, >= 0; more than were hit means all that were.
        share: instead of ``n``, the fewest pairs that hold this share of the forget set's hits, in (0, 1], so that the
            number suits the class. .95 forgets completely in `python -m kvb unlearn`.
        retain_hits: [C, K] >= 0, ``hits`` of what to retain. Pairs then go in the order of
            ``forget_hits**2 / (forget_hits + retain_hits)``: hits weighted by the forget set's share of a pair, which
            forgets more for the same n.
        keep: [C, K] bool, True for pairs that must stay.
    Returns:
        [C, K] bool, True where a pair may still be fetched, for ``forget`` or ``erase``; masks combine by ``&``.
    Raises:
        TypeError: types and dtypes. ValueError: shapes, a number out of its range, or not exactly one of ``n`` and
        ``share``.
    Source: Shah et al., arXiv:2311.15268; share, retain_hits and keep are ours.
    Examples:
        >>> kvb.unlearning.mask_by_activations(torch.tensor([[5, 0, 1]]), n=1)
        tensor([[False,  True,  True]])
        >>> kvb.unlearning.mask_by_activations(torch.tensor([[5, 0, 1]]), share=1.0)
        tensor([[False,  True, False]])
    """
    _require_hits("mask_by_activations", "forget_hits", forget_hits)
    validation.shape("forget_hits", forget_hits, "C K", (None, None))
    C, K = forget_hits.shape
    score = forget_hits.double()
    if retain_hits is not None:
        _require_hits("mask_by_activations", "retain_hits", retain_hits)
        validation.shape("retain_hits", retain_hits, "C K", (C, K))
        validation.same_device("retain_hits", retain_hits, "forget_hits", forget_hits)
        score = score.square() / (score + retain_hits).clamp(min=torch.finfo(score.dtype).tiny)
    if (n is None) == (share is None):
        raise ValueError(f"give one of n and share, got n={n!r} and share={share!r}")
    order = torch.argsort(score.flatten(), descending=True, stable=True)
    if share is None:
        count = validation.count("n", n)
    else:
        if validation.number("share", share, 0.0, float("inf"), open_low=True) > 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        reached = forget_hits.flatten()[order].double().cumsum(0)
        count = int((reached < share * reached[-1]).sum()) + 1
    mask = torch.ones(C * K, dtype=torch.bool, device=forget_hits.device)
    mask[order[:count]] = False
    return _left_usable("mask_by_activations", mask.view(C, K) | (forget_hits == 0), score, keep)


def mask_by_examples(
    bottleneck: KeyValueBottleneck, examples: Tensor | CodeDataset | Iterable[Any], *, keep: Tensor | None = None
) -> Tensor:
    """Unlearning via examples: a mask that leaves out every pair that N_e examples of the forget set fetch.

    Equivalent to ``hits(bottleneck, examples) == 0``. Where examples fetch every pair of a codebook, the pair that they
    fetch least stays: something must be fetched.

    Args:
        bottleneck, examples: as for ``hits``.
        keep: [C, K] bool, True for pairs that must stay.
    Returns:
        [C, K] bool, True where a pair may still be fetched, for ``forget`` or ``erase``; masks combine by ``&``.
    Raises:
        as ``hits``; TypeError, ValueError: a mask to keep that does not fit.
    Source: Shah et al., arXiv:2311.15268; keep is ours.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(1, 3, dim_keys=8, dim_values=10)
        >>> kvb.unlearning.mask_by_examples(bottleneck, torch.tensor([[0], [2]]))
        tensor([[False,  True, False]])
    """
    found = hits(bottleneck, examples)
    return _left_usable("mask_by_examples", found == 0, found, keep)


def _require_hits(owner: str, name: str, value: Any) -> Tensor:
    kind = validation.tensor(owner, name, value).dtype
    if kind == torch.bool or kind.is_complex:
        raise TypeError(f"{owner}(): expected {name} to be counts, got {kind}")
    if not bool((value >= 0).all()):
        raise ValueError(f"{name} holds negative or NaN counts")
    return value


def _left_usable(owner: str, mask: Tensor, score: Tensor, keep: Tensor | None) -> Tensor:
    """The mask with the pairs to keep, and with the pair of lowest score in each codebook that would have none."""
    if keep is not None:
        mask = mask | validation.mask(owner, keep, mask.shape[0], mask.shape[1], name="keep").to(mask.device)
    empty = ~mask.any(-1)
    mask[empty, score.argmin(-1)[empty]] = True
    return mask


# --- forgetting -------------------------------------------------------------------------------------------------------


def forget(bottleneck: KeyValueBottleneck, mask: Tensor) -> Tensor | None:
    """Stop fetching what ``mask`` leaves out, in addition to what the current mask does; values and keys do not change.

    Equivalent to ``before = bottleneck.pair_mask; bottleneck.mask_pairs(mask if before is None else before & mask)``.
    A query of the forget set then fetches the nearest pair that is left. The mask is saved with the module. Codes
    cached before name masked pairs: encode again.

    To remember: ``bottleneck.mask_pairs(before)`` restores every output bit for bit. To relearn, train on new codes:
    the pairs that are left learn, masked ones do not, even if examples of the class come again.

    Args:
        bottleneck: of C codebooks and K pairs.
        mask: [C, K] bool, True where a pair may be fetched.
    Returns:
        the former mask of the module, or None: what ``bottleneck.mask_pairs`` takes to undo this.
    Raises:
        TypeError, ValueError: a mask that does not fit, or that, with the current mask and deactivated counts, leaves a
        codebook without a pair to fetch; the module does not change. NotImplementedError: a table that
        ``kvb.distributed.parallelize`` split.
    Source: Shah et al., arXiv:2311.15268: masked pairs as excluded from the search.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(1, 3, dim_keys=8, dim_values=10).freeze_keys()
        >>> before = kvb.unlearning.forget(bottleneck, torch.tensor([[False, True, True]]))
        >>> bool((bottleneck.encode(torch.randn(100, 1, 8)) > 0).all())
        True
        >>> bottleneck = bottleneck.mask_pairs(before)  # and back
    """
    C, K = _pairs("forget", bottleneck)
    if hasattr(bottleneck.values, "device_mesh"):
        raise NotImplementedError(
            "forget() needs all of the module's mask, and the table is split over processes: call "
            "bottleneck.mask_pairs(mask) in every process, and keep the former mask yourself"
        )
    mask = validation.mask("forget", mask, C, K).to(bottleneck.keys.device)
    usable = bottleneck._search_mask()
    empty = ~(mask if usable is None else mask & usable).any(-1)
    if bool(empty.any()):
        books = empty.nonzero()[:, 0].tolist()
        raise ValueError(
            f"mask leaves no pair to fetch in {len(books)} of {C} codebooks, the first of them {books[0]}: "
            "forget less, or keep pairs"
        )
    before = bottleneck.pair_mask
    bottleneck.mask_pairs(mask if before is None else before & mask)
    return before


@torch.no_grad()
def erase(bottleneck: KeyValueBottleneck, mask: Tensor, fill: float = 0.0) -> None:
    """Overwrite the values that ``mask`` leaves out; the search and the codes do not change. Cannot be undone.

    Equivalent to ``bottleneck.values.data[~mask] = fill``. Nothing of what these pairs learned is left in the module;
    an optimizer may hold more (the moments of Adam, say). After ``forget`` with the same mask it changes no output.
    Alone it forgets less: a sample whose pairs are all empty gets equal logits, and pairs that are left decide about
    any other sample. To relearn, train as before: on the same codes, the same pairs learn again.

    Args:
        bottleneck: of C codebooks and K pairs.
        mask: [C, K] bool, True where a value stays.
        fill: what the others become: 0 is no vote for any class.
    Raises:
        TypeError, ValueError: a mask that does not fit, or a fill that is no finite number.
    Source: Shah et al., arXiv:2311.15268: masked pairs as suppressed values, the other reading.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(1, 3, dim_keys=8, dim_values=10)
        >>> kvb.unlearning.erase(bottleneck, torch.tensor([[False, True, True]]))
        >>> bottleneck.values.any(-1)
        tensor([[False,  True,  True]])
    """
    C, K = _pairs("erase", bottleneck)
    mask = validation.mask("erase", mask, C, K).to(bottleneck.values.device)
    infinity = float("inf")
    fill = validation.number("fill", fill, -infinity, infinity, open_low=True)
    bottleneck._table().masked_fill_(~bottleneck._part(mask)[..., None], fill)
