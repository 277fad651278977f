"""``init_keys`` and ``encode_dataset``: what reads whole data sets, the same in a bottleneck and in what wraps one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from kvb import collectives, items, validation
from kvb.data import CodeDataset, encode
from kvb.modules import key_learning
from kvb.modules.key_report import KeyReport
from kvb.modules.samples import cut
from kvb.modules.streams import Part, Stream


class ReadsData:
    """A module with ``encode``, and a bottleneck: itself or one that it wraps."""

    encode: Callable[..., Tensor]
    _dear = False  # whether making queries costs an encoder's time

    def _target(self) -> Any:
        """The ``KeyValueBottleneck``."""
        raise NotImplementedError

    def _features(self, inputs: Any, mask: Tensor | None) -> Part:
        """What is made once of the inputs of one batch, [B, ...], and the mask for the bottleneck."""
        raise NotImplementedError

    def _heads(self, features: Tensor) -> Tensor:
        """Features, on any device -> x [B, C, *shape, D] for the bottleneck."""
        raise NotImplementedError

    def _codes(self, inputs: Any, mask: Tensor | None, dtype: torch.dtype) -> Part:
        """``encode``, and the mask that was used."""
        raise NotImplementedError

    def _counted(self, features: Part) -> Tensor:
        """Queries [B, S, C, D] of features: those that a mask lets count, if there is one, as [M, 1, C, D]."""
        heads, mask = self._heads(features.made), self._moved(features.mask)
        queries: Tensor = self._target()._queries(heads, mask)
        return queries if mask is None else queries[mask.reshape(queries.shape[:2])][:, None]

    def _cut(self, data: Tensor) -> tuple[Tensor, ...]:
        """A tensor of inputs in batches."""
        return cut(data)

    def _moved(self, inputs: Any) -> Any:
        """Inputs on the device of the bottleneck, where they are a tensor."""
        return inputs.to(self._target()._device) if isinstance(inputs, Tensor) else inputs

    def init_keys(
        self,
        data: Tensor | Iterable[Any],
        method: key_learning.Method | None = None,
        *,
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        mask: Tensor | None = None,
        mask_extractor: Callable[[Any], Any] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
        sync: bool = True,
    ) -> KeyReport:
        """Initialise the keys from unlabelled data, then let them learn for ``epochs`` passes of moving averages.

        "random" keeps the keys (standard normal, if there are none yet); "sample" takes random rows; "kmeans" and
        "kmeans++" run ``kmeans_iters`` iterations on a random sample of 64*K rows of all data, in whatever order it
        comes. Data is streamed, and read once for the sample, which stays in the host's memory meanwhile, and once per
        epoch. Without epochs, the report is measured in one more pass, or on the sample of k-means where an encoder
        would have to run again. Rows with NaN or Inf are skipped. Values and counts do not change, and a call that
        fails changes nothing.

        Args:
            data: a tensor such as ``forward`` takes, or an iterable (a DataLoader, say) of inputs or of (inputs, ...)
                items.
            method: one of the ``init_mode``s; None takes the module's.
            epochs: passes of moving averages with dead-code replacement; 0 for none.
            inputs_extractor: takes the inputs out of an item of ``data``; by default its first element, and of a
                mapping all but the labels.
            mask: bool [N, *shape] for a tensor: True where a position counts. The others are as if they were not there.
            mask_extractor: takes the mask [B, *shape] out of an item of ``data`` that is iterated; None counts all.
            generator: makes the result reproducible.
            progress: show a progress bar.
            sync: with the processes of ``process_group``, each of which calls this with its own part of the data, also
                if that is empty; False for this process alone.
        Returns:
            a ``KeyReport`` (inertia, dead codes), measured on the last pass. Where hardly any key is in
            use, a ``UserWarning`` says what to do, once for each bottleneck.
        Raises:
            RuntimeError: the keys are frozen; another process failed, or did not call this in time. ValueError: no
            rows, none finite, or a one-shot iterator where several passes are needed. And as ``forward``.
        """
        bottleneck = self._target()
        method = validation.choice("method", method or bottleneck.init_mode, key_learning.METHODS)
        validation.epochs(epochs)
        if bottleneck.keys_frozen:
            raise RuntimeError("keys are frozen: call unfreeze_keys() before init_keys(...)")
        passes = key_learning.passes_needed(method, epochs, dear=self._dear)
        taken = items.taken_apart(
            data, cut=self._cut, inputs_extractor=inputs_extractor, mask=mask, mask_extractor=mask_extractor
        )
        group: collectives.Group = bottleneck._processes() if sync else False
        stream = self._stream(*taken, passes, progress, group, lasting=isinstance(data, Tensor))
        report: KeyReport = bottleneck._initialise(stream, method, epochs, generator)
        bottleneck._warn_of(report)
        return report

    def _stream(
        self,
        batches: Iterable[Any],
        taken: Callable[[Any], items.Taken],
        passes: int,
        progress: bool,
        group: collectives.Group,
        *,
        lasting: bool,
    ) -> Stream:
        """Batches as queries, when all processes of the group are here."""

        def features(item: Any) -> Part:
            _, inputs, counted = taken(item)
            with items.by_name(inputs):
                return self._features(self._moved(inputs), self._moved(counted))

        device = self._target()._device
        collectives.meet("init_keys", group, device=device)
        return Stream(
            *(batches, features, self._counted),
            lasting=lasting,
            dear=self._dear,
            passes=passes,
            progress=progress,
            group=group,
            device=device,
        )

    def encode_dataset(
        self,
        data: Tensor | Iterable[Any],
        *,
        dtype: torch.dtype | Literal["auto"] = "auto",
        out: str | os.PathLike[str] | None = None,
        inputs_extractor: Callable[[Any], Any] | None = None,
        mask: Tensor | None = None,
        mask_extractor: Callable[[Any], Any] | None = None,
        labels: bool = True,
        labels_extractor: Callable[[Any], Any] | None = None,
        progress: bool = True,
    ) -> CodeDataset:
        """The codes of a whole data set: an encoder, if there is one, and the search run once for every sample.

        Equivalent to ``CodeDataset(torch.cat([encode(x, dtype=dtype) for x, y in data]), torch.cat([y ...]))``.
        Train on the result with ``decode``.

        Args:
            data: a tensor such as ``forward`` takes, or an iterable (a DataLoader, say), read once: of inputs, of
                (inputs, labels, ...) items, or of mappings (Hugging Face) whose labels are called "labels", "label",
                "targets" or "y", whichever comes first in this list, and whose other entries are the inputs.
            dtype: as for ``encode``; "auto" is int16 up to K = 32768, int32 above.
            out: a file (.npy) to write the codes to as they come, and then the labels; the result is a map of it, and
                ``CodeDataset.open`` maps it again. None keeps them in memory.
            inputs_extractor: takes x out of an item of ``data``. Labels of a tuple are then its only other element.
            mask, mask_extractor: as for ``init_keys``. The result keeps the mask that was used, for ``decode``.
            labels: keep labels where the items have them; False for none.
            labels_extractor: takes the labels out of an item: [B, ...], anything that torch can turn into a tensor.
            progress: show a progress bar.
        Returns:
            a ``CodeDataset``: codes [N, C, *shape] (topk axis after C), labels [N, ...] or None, mask [N, *shape] or
            None.
        Raises:
            as ``encode``; TypeError: data that is no tensor and cannot be iterated; labels that are no numbers.
            ValueError: no samples, samples of different shapes; labels in some items only, not one per sample, or in
            one of several places; masks in some items only. OSError: the file cannot be written. An old file then is as
            it was.
        """
        storage = validation.code_dtype(dtype, self._target().key_value_pairs_per_codebook)

        def search(inputs: Any, counted: Any) -> tuple[Tensor, Tensor | None]:
            with items.by_name(inputs):
                return self._codes(self._moved(inputs), self._moved(counted), storage)

        return encode(
            data,
            search,
            cut=self._cut,
            out=out,
            inputs_extractor=inputs_extractor,
            mask=mask,
            mask_extractor=mask_extractor,
            labels=labels,
            labels_extractor=labels_extractor,
            progress=progress,
        )
