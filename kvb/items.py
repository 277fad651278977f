"""Items of a loader: which part of one is the input, which the labels, and labels of any kind as tensors.

a tensor                        inputs
(inputs, labels, ...)           a tuple or list, as of a TensorDataset
{"x": ..., "labels": ...}       a mapping, as of Hugging Face: labels are the first of ``NAMES`` that it holds, and
                                everything else is input
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvb import validation

NAMES = ("labels", "label", "targets", "y")
_UNFIT = (TypeError, ValueError, RuntimeError, OverflowError)  # of torch.tensor
_ADVICE = "pass labels_extractor=lambda item: ..., or labels=False to have none"
_SHOWN = 8  # names in a message


class Taken(NamedTuple):
    """An item, and what was taken out of it."""

    item: Any
    inputs: Any
    mask: Any  # [B, *shape], which positions count; None for all


def taken_apart(
    data: Tensor | Iterable[Any],
    *,
    cut: Callable[[Tensor], Sequence[Tensor]],
    inputs_extractor: Callable[[Any], Any] | None,
    mask: Tensor | None,
    mask_extractor: Callable[[Any], Any] | None,
) -> tuple[Iterable[Any], Callable[[Any], Taken]]:
    """Data as batches, and what takes one of them apart. A tensor, and its mask, are cut.

    Raises:
        TypeError: data is no tensor and cannot be iterated; a mask that is not bool. ValueError: a mask of another
        number of samples, or given in the way that data of the other kind takes.
    """
    if not isinstance(data, Tensor):
        validation.batches(data)
        if mask is not None:
            raise ValueError(
                f"mask goes with data that is a tensor, got data of type {type(data).__name__}: pass "
                "mask_extractor=lambda item: ... to take a mask out of every item"
            )
        return data, lambda item: Taken(
            item, inputs_of(item, inputs_extractor), None if mask_extractor is None else mask_extractor(item)
        )
    if mask_extractor is not None:
        raise ValueError("mask_extractor goes with data that is iterated, got a tensor: pass mask=... [N, *shape]")
    parts = cut(data)
    if mask is None:
        return parts, lambda part: Taken(part, part, None)
    validation.mask_of_samples(mask, len(data))
    pairs = list(zip(parts, mask.split([len(part) for part in parts]), strict=True))
    return pairs, lambda pair: Taken(pair[0], *pair)


def inputs_of(item: Any, extractor: Callable[[Any], Any] | None = None) -> Any:
    """The inputs in an item: what the extractor returns, its first element, a mapping without labels, or the item."""
    if extractor is not None:
        return extractor(item)
    if isinstance(item, Mapping):
        taken = _name(item)
        return item if taken is None else {name: value for name, value in item.items() if name != taken}
    return item[0] if isinstance(item, (tuple, list)) else item


@contextlib.contextmanager
def by_name(inputs: Any) -> Iterator[None]:
    """Tells how to pick one entry where an encoder does not take those of a mapping."""
    try:
        yield
    except TypeError as error:
        if not isinstance(inputs, Mapping) or "unexpected keyword argument" not in str(error):
            raise
        names = ", ".join(map(repr, list(inputs)[:_SHOWN]))
        raise TypeError(
            f"{error}; an encoder gets the entries of a mapping by their names, here {names}: pass "
            "inputs_extractor=lambda item: item[...] to pick one"
        ) from error


def labels_of(item: Any, inputs: Any, mask: Any = None, *, extracted: bool = False) -> Any:
    """The labels in an item as they are, or None if it has none. A mask is never the labels.

    Args:
        inputs: what ``inputs_of`` found. mask: what an extractor found, or None.
        extracted: an extractor found it, so that labels of a tuple are its only other element.
    Raises:
        ValueError: more than one element may hold the labels.
    """
    if isinstance(item, Mapping):
        name = _name(item)
        return None if name is None else item[name]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        return None
    parts = item if mask is None else _without(item, mask)
    masked = len(parts) < len(item)
    found = parts[1:2] if not extracted else _without(parts, inputs)
    if masked and not found:
        return None
    if len(found) == 1:
        if mask is not None and not masked and _shape(found[0]) == _shape(mask):
            raise ValueError(
                f"mask_extractor leaves open which element of an item holds the labels, got ({_described(item)}), "
                f"where one has the shape of the mask; {_ADVICE}"
            )
        return found[0]
    raise ValueError(
        f"inputs_extractor leaves open which element of an item holds the labels, got ({_described(item)}); {_ADVICE}"
    )


def label_tensor(found: Any, advice: str = "") -> Tensor:
    """Labels as one tensor on the host, from a tensor, an array, numbers in lists, or one of these in a mapping.

    ``advice`` ends the error message.

    Raises:
        TypeError: torch cannot make a tensor of them.
    """
    if isinstance(found, Mapping):
        name = _name(found)
        if name is None:
            names = ", ".join(map(repr, list(found)[:_SHOWN]))
            raise TypeError(f"labels must be numbers, got a mapping with {names} and none of {NAMES}{advice}")
        found = found[name]
    if isinstance(found, Tensor):
        return validation.tensor("labels", "labels", found).detach().cpu()
    try:
        if isinstance(found, (list, tuple)) and found and isinstance(found[0], Tensor):
            return torch.stack(list(found)).detach().cpu()
        if hasattr(found, "__array__"):
            found = found.__array__()
        return torch.tensor(found, device="cpu")
    except _UNFIT as error:
        raise TypeError(
            f"labels must be what torch can turn into a tensor, got {_described(found)} ({error}){advice}"
        ) from error


class Labels:
    """The labels of a data set, one item after the other, all of one dtype and shape.

    Args:
        wanted: False for none.
        inputs_extractor, labels_extractor: those of ``encode_dataset``.
    """

    wanted: bool
    extractor: Callable[[Any], Any] | None

    def __init__(
        self,
        wanted: bool,
        inputs_extractor: Callable[[Any], Any] | None,
        labels_extractor: Callable[[Any], Any] | None,
    ) -> None:
        if not isinstance(wanted, bool):
            raise TypeError(f"labels must be True or False, got {_described(wanted)}")
        if labels_extractor is not None and not wanted:
            raise ValueError("labels=False contradicts labels_extractor: give one of them")
        self.wanted, self.extractor = wanted, labels_extractor
        self.inputs_extracted: bool = inputs_extractor is not None
        self.parts: list[Tensor] = []
        self.samples: int = 0

    def find(self, item: Any, inputs: Any, mask: Any = None) -> Any:
        """The labels of an item, or None."""
        if not self.wanted:
            return None
        if self.extractor is not None:
            return self.extractor(item)
        return labels_of(item, inputs, mask, extracted=self.inputs_extracted)

    def add(self, found: Any, samples: int) -> None:
        """Keep what ``find`` found in an item of ``samples`` samples.

        Raises:
            TypeError: labels that are no numbers. ValueError: another number than samples, another dtype or shape than
            before, or labels in some items only.
        """
        if self.samples and (found is None) == bool(self.parts):
            raise ValueError("expected labels in all items of data or in none, got them in some only")
        self.samples += samples
        if found is None:
            return
        labels = label_tensor(found, f"; {_ADVICE}")
        labels = labels[None] if labels.dim() == 0 and samples == 1 else labels
        if labels.dim() == 0 or len(labels) != samples or labels.numel() == 0:
            raise ValueError(
                f"expected labels for each of the {samples} samples of an item, got {_described(found)}; {_ADVICE}"
            )
        if self.parts and (labels.dtype != self.parts[0].dtype or labels.shape[1:] != self.parts[0].shape[1:]):
            first = self.parts[0]
            raise ValueError(
                f"expected labels of one dtype and shape for all samples, {first.dtype} {tuple(first.shape[1:])}, "
                f"got {labels.dtype} {tuple(labels.shape[1:])}"
            )
        self.parts.append(labels)


def _name(item: Mapping[Any, Any]) -> str | None:
    """The name of a mapping's labels."""
    return next((name for name in NAMES if name in item and item[name] is not None), None)


def _without(parts: Sequence[Any], taken: Any) -> Sequence[Any]:
    """All parts but the one that is what was taken, or that holds it."""
    others = [part for part in parts if part is not taken]
    return others if len(others) < len(parts) else [part for part in parts if not _share_memory(part, taken)]


def _share_memory(part: Any, inputs: Any) -> bool:
    if not (isinstance(part, Tensor) and isinstance(inputs, Tensor)):
        return False
    return part.device == inputs.device and part.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()


def _shape(found: Any) -> Any:
    return getattr(found, "shape", None)


def _described(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"Tensor {tuple(found.shape)} {found.dtype}"
    if isinstance(found, (tuple, list)):
        inner = ", ".join(map(_described, found[:_SHOWN])) if found and not isinstance(found[0], (int, float)) else ""
        return f"{type(found).__name__} of {len(found)}{inner and f': {inner}'}"
    shape = _shape(found)
    return f"{type(found).__name__}{'' if shape is None else f' {tuple(shape)}'}"
