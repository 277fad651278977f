"""Caches each sample's codes: what a frozen model finds for a data set, kept for training without a search.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3: keys are frozen before
the values learn, so that the codes of a sample never change again.
"""

from __future__ import annotations

import multiprocessing.context
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from kvb import files, items, npy, validation

PATIENCE = 1.0  # seconds until encoding shows its progress


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
    """The codes of N samples, and their labels if there are any: an item is ``codes[i]`` or ``(codes[i], labels[i])``.

    Made by ``encode_dataset``; ``decode(batch, pool="mean")`` or ``kvb.training.sgd_step`` trains on it. Workers of a
    DataLoader map its file, if it has one, instead of getting a copy. ``torch.load(path, weights_only=True)`` loads
    what ``torch.save`` wrote.

    Equivalent to ``torch.utils.data.TensorDataset(codes, labels)``, with whole batches for a DataLoader in one read,
    and ``batches``, which is faster than any DataLoader.

    Args:
        codes: [N, C, *shape] integers; a memory map is never copied.
        labels: [N, ...], or None.
    Raises:
        TypeError: codes that are not integers, labels that are no tensor. ValueError: codes with fewer than two axes,
        or another number of labels.
    """

    _file: _File | None = None

    def __init__(self, codes: Tensor, labels: Tensor | None = None) -> None:
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
        self.codes = codes
        self.labels = labels

    @classmethod
    def open(cls, path: str | os.PathLike[str], labels: Tensor | None = None) -> CodeDataset:
        """Map the codes and labels that ``encode_dataset(..., out=path)`` wrote; nothing is read before it is used.

        The file is a .npy: ``numpy.load(path, mmap_mode="r")`` reads the codes, too. Labels follow as a second array.
        Writing to the tensors does not change the file.

        Args:
            path: the .npy file.
            labels: [N, ...] instead of those of the file.
        Raises:
            ValueError: the file is no .npy of int16, int32 or int64 in C order, or is damaged; labels that do not fit.
            OSError: it cannot be read.
        """
        return cls._of(_File.open(path), labels)

    @classmethod
    def _of(cls, file: _File, labels: Tensor | None) -> CodeDataset:
        found = cls(file.mapped.codes, file.mapped.labels if labels is None else labels)
        found._file = file
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A worker that is being started finds the file by its path; anything else gets the numbers."""
        file = self._file
        if file is None or multiprocessing.context.get_spawning_popen() is None or not file.is_there():
            return super().__reduce_ex__(protocol)
        mapped = [name for name in ("codes", "labels") if vars(self)[name] is getattr(file.mapped, name)]
        others = {name: value for name, value in vars(self).items() if name not in (*mapped, "_file")}
        return _remapped, (type(self), file.path, file.mapped.identity, mapped, others)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CodeDataset.__init__(self, state["codes"], state["labels"])  # a file may hold anything
        vars(self).update(state)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Any:
        return self.codes[index] if self.labels is None else (self.codes[index], self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader calls for a batch: one read for all its samples."""
        rows = torch.as_tensor(indices, device=self.codes.device)
        codes = self.codes[rows].unbind()
        return list(codes) if self.labels is None else list(zip(codes, self.labels[rows].unbind(), strict=True))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Any]:
        """One pass in batches of codes [B, C, *shape], or of ``(codes, labels)``.

        Args:
            batch_size: B.
            shuffle: in an order drawn anew for this pass.
            drop_last: leave out a last batch that is smaller.
            generator: makes the order reproducible.
        Raises:
            TypeError, ValueError: batch_size is no positive integer.
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
            yield self.codes[rows] if self.labels is None else (self.codes[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> CodeDataset:
        """The same codes and labels on a device."""
        return CodeDataset(self.codes.to(device), None if self.labels is None else self.labels.to(device))

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"labels {tuple(self.labels.shape[1:])}"
        codes = f"codes {tuple(self.codes.shape[1:])} {self.codes.dtype}, {self.codes.nbytes / 1e6:.4g} MB"
        return f"CodeDataset({len(self)} samples, {codes}, {labels})"


def _remapped(
    kind: type[CodeDataset], path: str, identity: tuple[int, ...], mapped: list[str], others: dict[str, Any]
) -> CodeDataset:
    """What ``CodeDataset`` pickles for a worker, put together there."""
    file = _File.open(path)
    if file.mapped.identity != identity:
        raise ValueError(f"{path!r} was written anew while a worker was about to open it: open the data set again")
    found = kind.__new__(kind)
    vars(found).update(others, _file=file, **{name: getattr(file.mapped, name) for name in mapped})
    return found


torch.serialization.add_safe_globals([CodeDataset])

# --- encoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    data: Tensor | Iterable[Any],
    search: Callable[[Any], Tensor],
    *,
    cut: Callable[[Tensor], Sequence[Tensor]],
    out: str | os.PathLike[str] | None,
    inputs_extractor: Callable[[Any], Any] | None,
    progress: bool,
    labels: bool = True,
    labels_extractor: Callable[[Any], Any] | None = None,
) -> CodeDataset:
    """Run ``search`` over data, read once, and keep its codes.

    Args:
        data: a tensor of inputs, cut into batches, or an iterable of items as ``kvb.items`` takes them apart.
        search: inputs of one batch -> codes [B, C, *shape] in the dtype to store.
        cut: makes batches of a tensor.
        out: a file for codes and labels; None keeps them in memory.
        inputs_extractor: takes the inputs out of an item.
        progress: show a progress bar.
        labels: keep labels where the items have them; False for none.
        labels_extractor: takes the labels out of an item.
    Raises:
        TypeError: data is neither; labels that are no numbers. ValueError: no samples; shapes that change; labels in
        some items only, or one too many, or that may be in several places. OSError: the file cannot be written.
        Whatever is raised, an old file is as it was.
    """
    if not isinstance(data, (Tensor, Iterable)):
        raise TypeError(f"data must be a Tensor or an iterable of batches, not {type(data).__name__}")
    kept = items.Labels(labels, inputs_extractor, labels_extractor)
    batches: Iterable[Any] = cut(data) if isinstance(data, Tensor) else data
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(batches, desc="encoding", total=total, disable=not progress, leave=False, delay=PATIENCE)

    def parts() -> Iterator[Tensor]:
        for item in bar:
            inputs = items.inputs_of(item, inputs_extractor)
            found = kept.find(item, inputs)
            codes = search(inputs).cpu()
            if len(codes):
                kept.add(found, len(codes))
                if out is not None and kept.parts and not npy.stores(kept.parts[0].dtype):
                    raise TypeError(f"a .npy file cannot hold labels of {kept.parts[0].dtype}: convert them first")
                yield codes

    if out is None:
        codes = torch.cat(list(_checked(parts())))
        return CodeDataset(codes, torch.cat(kept.parts) if kept.parts else None)
    with files.replacing(out) as file:
        npy.write(file, _checked(parts()), kept.parts)
        file.flush()
        if os.name == "posix":  # this very file is mapped, whoever else writes to its path
            return CodeDataset._of(_File(os.path.abspath(out), npy.read(file, os.fspath(out))), None)
    return CodeDataset.open(out)


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
