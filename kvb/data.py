"""Caches each sample's codes: what a frozen model finds for a data set, kept for training without a search.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3: keys are frozen before
the values learn, so that the codes of a sample never change again.
"""

from __future__ import annotations

import multiprocessing.context
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvb import bars, files, items, npy, validation

_PARTS = "codes", "labels", "mask"


class _File(NamedTuple):
    """The file that a data set's tensors are maps of."""

    path: str
    mapped: npy.Mapped

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> _File:
        with open(path, "rb") as file:
            return cls(os.path.abspath(path), npy.read(file, os.fspath(path)))

    def is_there(self) -> bool:
        """Whether the path still names this file."""
        try:
            return npy.identity(os.stat(self.path)) == self.mapped.identity
        except OSError:
            return False


class CodeDataset(Dataset[Any]):
    """The codes of N samples, with their labels and masks if there are any.

    An item is ``codes[i]``, or a tuple of it, ``labels[i]`` and ``mask[i]``, as far as there are any, in this order.

    Made by ``encode_dataset``; ``decode(batch, pool="mean")`` or ``kvb.training.sgd_step`` trains on it. Workers of a
    DataLoader map its file, if it has one, instead of receiving a copy. ``torch.load(path, weights_only=True)`` loads
    what ``torch.save`` wrote.

    Equivalent to ``torch.utils.data.TensorDataset(codes, labels)``, with whole batches for a DataLoader in one read,
    and ``batches``, which is faster than any DataLoader.

    Args:
        codes: [N, C, *shape] integers; a memory map is never copied.
        labels: [N, ...], or None.
        mask: bool [N, *shape], True where a position counts, for ``decode(codes, mask=mask)``; None where all do.
    Raises:
        TypeError: codes that are not integers, labels that are no tensor, a mask that is not bool. ValueError: codes
        with fewer than two axes, another number of labels, or a mask of other positions.
    Examples:
        >>> data = kvb.CodeDataset(torch.randint(16, (100, 4)), labels=torch.randint(10, (100,)))
        >>> codes, labels = next(data.batches(32))
        >>> codes.shape, labels.shape
        (torch.Size([32, 4]), torch.Size([32]))
    """

    _file: _File | None = None

    def __init__(self, codes: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> None:
        validation.integer("CodeDataset", "codes", codes)
        if codes.dim() < 2:
            raise ValueError(f"expected codes of shape (N, C, *shape), got {tuple(codes.shape)}")
        if labels is not None:
            validation.tensor("CodeDataset", "labels", labels)
            if labels.dim() == 0 or len(labels) != len(codes):
                raise ValueError(
                    f"expected labels of shape (N, ...) with one for each of the {len(codes)} samples in codes, "
                    f"got {tuple(labels.shape)}"
                )
        if mask is not None:
            ranked = codes.dim() - validation.tensor("CodeDataset", "mask", mask).dim() > 1  # a topk axis after C
            validation.positions("CodeDataset", mask, (len(codes), *codes.shape[2 + ranked :]), "N, *shape")
        self.codes = codes
        self.labels = labels
        self.mask = mask

    @classmethod
    def open(cls, path: str | os.PathLike[str], labels: Tensor | None = None) -> CodeDataset:
        """Map what ``encode_dataset(..., out=path)`` wrote; nothing is read before it is used.

        The file is a .npy: ``numpy.load(path, mmap_mode="r")`` reads the codes, too. Labels follow as a second array,
        the mask as a third.
        Writing to the tensors does not change the file.

        Args:
            path: the .npy file.
            labels: [N, ...], instead of the labels in the file.
        Raises:
            ValueError: the file is no .npy of int16, int32 or int64 in C order, or is damaged; labels that do not fit.
            OSError: it cannot be read.
        Examples:
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
            >>> data = bottleneck.encode_dataset(torch.randn(10, 4, 8), out="codes.npy", progress=False)
            >>> torch.equal(kvb.CodeDataset.open("codes.npy").codes, data.codes)
            True
        """
        return cls._of(_File.open(path), labels)

    @classmethod
    def _of(cls, file: _File, labels: Tensor | None) -> CodeDataset:
        found = cls(file.mapped.codes, file.mapped.labels if labels is None else labels, file.mapped.mask)
        found._file = file
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A worker that starts gets the path of the file; anything else gets the numbers."""
        file = self._file
        if file is None or multiprocessing.context.get_spawning_popen() is None or not file.is_there():
            return super().__reduce_ex__(protocol)
        mapped = [name for name in _PARTS if vars(self)[name] is getattr(file.mapped, name)]
        others = {name: value for name, value in vars(self).items() if name not in (*mapped, "_file")}
        return _remapped, (type(self), file.path, file.mapped.identity, mapped, others)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CodeDataset.__init__(self, state["codes"], state["labels"], state.get("mask"))  # a file may hold anything
        vars(self).update(state)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Any:
        return self._rows(index)

    def _rows(self, rows: Any) -> Any:
        """Codes, or a tuple with what else there is."""
        parts = tuple(part[rows] for part in (self.codes, self.labels, self.mask) if part is not None)
        return parts if len(parts) > 1 else parts[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader calls for a batch: reads all its samples at once."""
        found = self._rows(torch.as_tensor(indices, device=self.codes.device))
        if isinstance(found, Tensor):
            return list(found.unbind())
        return list(zip(*(part.unbind() for part in found), strict=True))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Any]:
        """One pass in batches of codes [B, C, *shape], or of tuples as items are.

        Args:
            batch_size: B.
            shuffle: in a new random order for this pass.
            drop_last: leave out a last batch that is smaller.
            generator: makes the order reproducible.
        Raises:
            TypeError, ValueError: batch_size is no positive integer.
        Examples:
            >>> data = kvb.CodeDataset(torch.zeros(10, 4, dtype=torch.int16))
            >>> [len(codes) for codes in data.batches(4)]
            [4, 4, 2]
        """
        validation.positive_int("batch_size", batch_size)
        return self._batches(batch_size, shuffle, drop_last, generator)

    def _batches(
        self, batch_size: int, shuffle: bool, drop_last: bool, generator: torch.Generator | None
    ) -> Iterator[Any]:
        N = len(self)
        place = torch.device("cpu") if generator is None else generator.device
        order = torch.randperm(N, generator=generator, device=place).to(self.codes.device) if shuffle else None
        for begin in range(0, N - batch_size + 1 if drop_last else N, batch_size):
            rows = slice(begin, begin + batch_size) if order is None else order[begin : begin + batch_size]
            yield self._rows(rows)

    def to(self, device: torch.device | str) -> CodeDataset:
        """The same on a device."""
        labels, mask = (None if part is None else part.to(device) for part in (self.labels, self.mask))
        return CodeDataset(self.codes.to(device), labels, mask)

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"labels {tuple(self.labels.shape[1:])}"
        codes = f"codes {tuple(self.codes.shape[1:])} {self.codes.dtype}, {self.codes.nbytes / 1e6:.4g} MB"
        mask = "" if self.mask is None else f", mask {tuple(self.mask.shape[1:])}"
        return f"CodeDataset({len(self)} samples, {codes}, {labels}{mask})"


def _remapped(
    kind: type[CodeDataset], path: str, identity: tuple[int, ...], mapped: list[str], others: dict[str, Any]
) -> CodeDataset:
    """Puts together in a worker what ``CodeDataset`` pickles for it."""
    file = _File.open(path)
    if file.mapped.identity != identity:
        raise ValueError(f"{path!r} was replaced while a worker was about to open it: open the data set again")
    found = kind.__new__(kind)
    vars(found).update(others, _file=file, **{name: getattr(file.mapped, name) for name in mapped})
    return found


torch.serialization.add_safe_globals([CodeDataset])

# --- encoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    data: Tensor | Iterable[Any],
    search: Callable[[Any, Any], tuple[Tensor, Tensor | None]],
    *,
    cut: Callable[[Tensor], Sequence[Tensor]],
    out: str | os.PathLike[str] | None,
    inputs_extractor: Callable[[Any], Any] | None,
    progress: bool,
    mask: Tensor | None = None,
    mask_extractor: Callable[[Any], Any] | None = None,
    labels: bool = True,
    labels_extractor: Callable[[Any], Any] | None = None,
) -> CodeDataset:
    """Run ``search`` over data, read once, and keep its codes.

    Args:
        data: a tensor of inputs, cut into batches, or an iterable of items as ``kvb.items`` takes them apart.
        search: inputs and mask of one batch -> codes [B, C, *shape] in the dtype to store, and the mask used, or None.
        cut: makes batches of a tensor.
        out: a file for codes, labels and mask; None keeps them in memory.
        inputs_extractor: takes the inputs out of an item.
        progress: show a progress bar.
        mask: of data that is a tensor. mask_extractor: takes the mask out of an item.
        labels: keep labels where the items have them; False for none.
        labels_extractor: takes the labels out of an item.
    Raises:
        TypeError: data is neither; labels that are no numbers. ValueError: no samples; shapes that change; labels or
        masks in some items only; labels not one per sample, or in one of several places. OSError: the file cannot be
        written. After any error, an old file is as it was.
    """
    kept = items.Labels(labels, inputs_extractor, labels_extractor)
    masks: list[Tensor] = []
    batches, taken = items.taken_apart(
        data, cut=cut, inputs_extractor=inputs_extractor, mask=mask, mask_extractor=mask_extractor
    )
    read = map(taken, bars.of(batches, "encoding", shown=progress))
    parts = _checked(_searched(read, search, kept, masks, filed=out is not None))
    if out is None:
        codes = torch.cat(list(parts))
        return CodeDataset(codes, *(torch.cat(rest) if rest else None for rest in (kept.parts, masks)))
    with files.replacing(out) as file:
        npy.write(file, parts, kept.parts, masks)
        file.flush()
        if os.name == "posix":  # this very file is mapped, whoever else writes to its path
            return CodeDataset._of(_File(os.path.abspath(out), npy.read(file, os.fspath(out))), None)
    return CodeDataset.open(out)


def _searched(
    batches: Iterable[items.Taken],
    search: Callable[[Any, Any], tuple[Tensor, Tensor | None]],
    labels: items.Labels,
    masks: list[Tensor],
    *,
    filed: bool,
) -> Iterator[Tensor]:
    """The codes of each batch that has samples; its labels and mask go where those of all batches are kept."""
    for item, inputs, given in batches:
        found = labels.find(item, inputs, given)
        codes, used = search(inputs, given)
        if len(codes) == 0:
            continue
        if labels.samples and (used is None) == bool(masks):
            raise ValueError("expected a mask for all items of data or for none, got one for some only")
        if used is not None:
            masks.append(used.cpu())
        labels.add(found, len(codes))
        if filed and labels.parts and not npy.stores(labels.parts[0].dtype):
            raise TypeError(f"a .npy file cannot hold labels of {labels.parts[0].dtype}: convert them first")
        yield codes.cpu()


def _checked(parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same parts; at least one, all of one shape."""
    shape = None
    for codes in parts:
        if shape is not None and codes.shape[1:] != shape:
            raise ValueError(
                f"expected codes of one shape for all samples, {tuple(shape)}, got {tuple(codes.shape[1:])}; "
                "pad or crop the inputs to one size"
            )
        shape = codes.shape[1:]
        yield codes
    if shape is None:
        raise ValueError("data yielded no samples")
