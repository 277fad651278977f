"""``init_keys`` and ``encode_dataset``: what reads whole data sets, the same in a bottleneck and in what wraps one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kvb import collectives, validation
from kvb.data import CodeDataset, encode
from kvb.items import inputs_of
from kvb.modules import key_learning
from kvb.modules.streams import Stream, cut


class ReadsData:
    """A module with ``encode``, and a bottleneck: itself or one that it wraps."""

    encode: Callable[..., Tensor]
    _replays = False  # whether making features is worth keeping them for k-means

    def _target(self) -> Any:
        """The ``KeyValueBottleneck``."""
        raise NotImplementedError

    def _features(self, inputs: Any) -> Tensor:
        """What is made once of the inputs of one batch: [B, ...]."""
        raise NotImplementedError

    def _heads(self, features: Tensor) -> Tensor:
        """Features, on any device -> x [B, C, *shape, D] for the bottleneck."""
        raise NotImplementedError

    def _cut(self, data: Tensor) -> tuple[Tensor, ...]:
        """A tensor of inputs in batches."""
        return cut(data)

    def _moved(self, inputs: Any) -> Any:
        """Inputs on the device of the bottleneck, where they are a tensor."""
        return inputs.to(self._target()._device) if isinstance(inputs, Tensor) else inputs

    def init_keys(
        self,
        data: Tensor | Iterable[Any],
        method: str | None = None,
        *,
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
        sync: bool = True,
    ) -> key_learning.KeyReport:
        """Initialise the keys from unlabelled data, then let them learn for ``epochs`` passes of moving averages.

        "random" keeps the keys (standard normal, if there are none yet); "sample" takes random rows; "kmeans" and
        "kmeans++" run ``kmeans_iters`` iterations on the first 64*K rows. Data is streamed and read once per pass; an
        encoder sees the rows of k-means once, and their features stay in the host's memory meanwhile. Rows with NaN or
        Inf are skipped. Values and counts do not change, and a call that fails changes nothing.

        Args:
            data: a tensor such as ``forward`` takes, or an iterable (a DataLoader, say) of inputs or of (inputs, ...)
                items.
            method: one of the ``init_mode``s; None takes the module's.
            epochs: passes of moving averages with dead-code replacement; 0 for none.
            inputs_extractor: takes the inputs out of an item of ``data``; by default its first element, and of a
                mapping all but the labels.
            generator: makes the result reproducible.
            progress: show a progress bar.
            sync: with the processes of ``process_group``, each of which calls this with its own part of the data, also
                if that is empty; False for this process alone.
        Returns:
            a ``KeyReport`` (inertia, dead codes), measured on the last pass.
        Raises:
            RuntimeError: the keys are frozen; another process failed, or did not call this in time. ValueError: no
            rows, none finite, or a one-shot iterator where several passes are needed. And as ``forward``.
        """
        bottleneck = self._target()
        method = validation.choice("method", method or bottleneck.init_mode, key_learning.METHODS)
        validation.epochs(epochs)
        if bottleneck.keys_frozen:
            raise RuntimeError("keys are frozen: call unfreeze_keys() before init_keys(...)")
        group: collectives.Group = bottleneck._processes() if sync else False
        collectives.meet("init_keys", group, device=bottleneck._device)
        stream = Stream(
            self._cut(data) if isinstance(data, Tensor) else data,
            lambda item: self._features(
                self._moved(item if isinstance(data, Tensor) else inputs_of(item, inputs_extractor))
            ),
            lambda features: bottleneck._queries(self._heads(features)),
            replay=self._replays,
            passes=key_learning.passes_needed(method, bottleneck.kmeans_iters, epochs, replay=self._replays),
            progress=progress,
            group=group,
            device=bottleneck._device,
        )
        report: key_learning.KeyReport = bottleneck._initialise(stream, method, epochs, generator)
        return report

    def encode_dataset(
        self,
        data: Tensor | Iterable[Any],
        *,
        dtype: torch.dtype | str = "auto",
        out: str | os.PathLike[str] | None = None,
        inputs_extractor: Callable[[Any], Any] | None = None,
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
                "targets" or "y", the first of these that is there, and whose other entries are the inputs.
            dtype: as for ``encode``; "auto" is int16 up to K = 32768, int32 above.
            out: a file (.npy) to write the codes to as they come, and then the labels; the result is a map of it, and
                ``CodeDataset.open`` maps it again. None keeps them in memory.
            inputs_extractor: takes x out of an item of ``data``. Labels of a tuple are then its only other element.
            labels: keep labels where the items have them; False for none.
            labels_extractor: takes the labels out of an item: [B, ...], anything that torch can turn into a tensor.
            progress: show a progress bar.
        Returns:
            a ``CodeDataset``: codes [N, C, *shape] (topk axis after C), labels [N, ...] or None.
        Raises:
            as ``encode``; TypeError: data that is no tensor and cannot be iterated; labels that are no numbers.
            ValueError: no samples, samples of different shapes; labels in some items only, not one per sample, or in
            one of several places. OSError: the file cannot be written. An old file then is as it was.
        """
        storage = validation.code_dtype(dtype, self._target().key_value_pairs_per_codebook)

        def search(inputs: Any) -> Tensor:
            return self.encode(self._moved(inputs), dtype=storage)

        return encode(
            data,
            search,
            cut=self._cut,
            out=out,
            inputs_extractor=inputs_extractor,
            labels=labels,
            labels_extractor=labels_extractor,
            progress=progress,
        )
