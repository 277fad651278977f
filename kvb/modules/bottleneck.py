"""``KeyValueBottleneck``: parameters, buffers, state and modes. The maths lives in the operators and in ``keys``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kvb import functional, ops, validation
from kvb._torch import register_namedtuple
from kvb.checkpoints import STATE_NAME
from kvb.data import CodeDataset, encode
from kvb.modules import key_learning

STATE_VERSION = 1
_HEADER = 8  # bytes of kvb_state before the mask bits: version, initialised, learning, counting, has a mask, 3 unused
_Self = TypeVar("_Self", bound="KeyValueBottleneck")


class BottleneckOutput(NamedTuple):
    """What ``KeyValueBottleneck`` returns with ``return_values_only=False``; a topk axis follows C if topk > 1."""

    values: Tensor  # [B, C, *shape, V]
    keys: Tensor  # [B, C, *shape, D]
    indices: Tensor  # [B, C, *shape] int64
    distances: Tensor  # [B, C, *shape] squared L2


# torch.export.save needs a name for the output type.
register_namedtuple(BottleneckOutput, serialized_type_name="kvb.BottleneckOutput")


class KeyValueBottleneck(nn.Module):
    """C codebooks of K key-value pairs: every head of the input fetches the value of its nearest key.

    Equivalent to, per codebook c: ``i = ((x[:, c, ..., None, :] - keys[c])**2).sum(-1).argmin(-1); values[c, i]``,
    without the distances. Only ``values`` is a parameter, and only fetched rows get a gradient.

    Modes. Keys learn by moving averages on forwards in training mode until ``freeze_keys()``; never in eval mode. Once
    frozen, forwards in training mode count which pairs are fetched until ``deactivate_counts()``, which restricts the
    search to counted pairs.

    Args:
        num_codebooks: C.
        key_value_pairs_per_codebook: K.
        dim_keys: D.
        dim_values: V.
        init_mode: "random" (standard normal keys), or from data: "sample", "kmeans", "kmeans++"; the latter three wait
            for ``init_keys(...)`` or for the first batch in training mode.
        kmeans_iters: Lloyd iterations of the k-means modes.
        decay: g of the moving averages, in [0, 1).
        eps: of the Laplace smoothing, > 0.
        threshold_ema_dead_code: pairs whose moving hit count falls below it are replaced by queries of the batch.
        sample_codebook_temperature: > 0 draws ``topk`` keys from softmax(-distance / temperature), without replacement,
            instead of the nearest.
        return_values_only: return a tensor, or else a ``BottleneckOutput``.
        topk: fetch so many nearest pairs; > 1 adds an axis after C.
        sparse_grad: give ``values`` a sparse gradient: the rows fetched, merged, never a dense [C, K, V]. For the
            optimizers and ``clip_grad_norm_`` of ``kvb.optim``, ``torch.optim.SGD`` and ``SparseAdam``; one graph break
            under ``torch.compile``.
        check_finite: raise ValueError when an input holds NaN or Inf. Reads the data: the host waits for the device.
    Shape:
        x [B, C, *shape, D] -> values [B, C, *shape, V].
    State:
        values [C, K, V] parameter; buffers initted [1], cluster_size [C, K], cluster_size_counter [C, K],
        keys_avg [C, K, D], keys [C, K, D]: the published names. ``kvb_state`` (uint8) adds the flags and the mask to
        a state_dict; a state_dict without it loads too, and leaves the flags as they are. Keys and their statistics
        stay float32 under ``half()`` and ``bfloat16()``.
    Not for two threads at once while keys learn or are counted; eval-mode forwards are safe.

    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
    """

    values: nn.Parameter
    initted: Tensor
    cluster_size: Tensor
    cluster_size_counter: Tensor
    keys_avg: Tensor
    keys: Tensor
    pair_mask: Tensor | None

    def __init__(
        self,
        num_codebooks: int,
        key_value_pairs_per_codebook: int,
        dim_keys: int,
        dim_values: int,
        init_mode: str = "random",
        kmeans_iters: int = 10,
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        sample_codebook_temperature: float = 0.0,
        return_values_only: bool = True,
        topk: int = 1,
        *,
        sparse_grad: bool = False,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        infinity = float("inf")
        C = validation.positive_int("num_codebooks", num_codebooks)
        K = validation.positive_int("key_value_pairs_per_codebook", key_value_pairs_per_codebook)
        D = validation.positive_int("dim_keys", dim_keys)
        V = validation.positive_int("dim_values", dim_values)
        self.init_mode = validation.choice("init_mode", init_mode, key_learning.METHODS)
        self.kmeans_iters = validation.positive_int("kmeans_iters", kmeans_iters)
        self.decay = validation.number("decay", decay, 0.0, 1.0)
        self.eps = validation.number("eps", eps, 0.0, infinity, open_low=True)
        threshold = validation.number("threshold_ema_dead_code", threshold_ema_dead_code, 0.0, infinity)
        self.threshold_ema_dead_code = threshold
        self.sample_codebook_temperature = validation.number(
            "sample_codebook_temperature", sample_codebook_temperature, 0.0, infinity
        )
        self.topk = validation.topk(topk, K)
        self.return_values_only = return_values_only
        self.sparse_grad = sparse_grad
        self.check_finite = check_finite
        self.update_keys = True
        self.count_cluster_size = True
        self._initialised = init_mode == "random"

        fresh = torch.randn(C, K, D) if self._initialised else torch.zeros(C, K, D)
        self.values = nn.Parameter(torch.randn(C, K, V))
        self.register_buffer("initted", torch.tensor([float(self._initialised)]))
        self.register_buffer("cluster_size", torch.ones(C, K))
        self.register_buffer("cluster_size_counter", torch.zeros(C, K))
        self.register_buffer("keys_avg", fresh.clone())
        self.register_buffer("keys", fresh)
        self.register_buffer("pair_mask", None, persistent=False)
        self._forget_packed()

    # --- sizes: those of the tensors, which may be exchanged for others -----------------------------------------------

    @property
    def num_codebooks(self) -> int:
        """C."""
        return self.keys.shape[0]

    @property
    def key_value_pairs_per_codebook(self) -> int:
        """K."""
        return self.keys.shape[1]

    @property
    def dim_keys(self) -> int:
        """D."""
        return self.keys.shape[2]

    @property
    def dim_values(self) -> int:
        """V."""
        return self.values.shape[2]

    # --- lookup -------------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, *, pool: str = "none", return_values_only: bool | None = None
    ) -> Tensor | BottleneckOutput:
        """x [B, C, *shape, D] -> values [B, C, *shape, V], or a ``BottleneckOutput``.

        Gradients reach ``values``; ``x`` gets one through ``distances`` only.

        Args:
            pool: "mean" or "sum" over codebooks, without the unpooled values in between: values [B, *shape, V].
            return_values_only: overrides the module's for this call.
        Raises:
            TypeError: not a floating-point tensor. ValueError: its shape does not fit, ``check_finite`` found NaN, or
            pooling with topk > 1. RuntimeError: another device, or keys that still wait for data in eval mode.
        """
        if validation.choice("pool", pool, functional.POOLS) != "none" and self.topk > 1:
            raise ValueError(f"pool={pool!r} needs topk=1, got topk={self.topk}; pool the result yourself")
        values_only = self.return_values_only if return_values_only is None else return_values_only
        queries = self._queries(x)
        if not self._initialised:
            self._initialise_from(x)
        shape = x.shape[2:-1]
        if values_only and self._in_one_pass(pool, shape):
            mask, packed = self._search_mask(), self._packed_keys()
            values, codes = ops.lookup(queries, self.keys, packed, self.values, mask, pool)
            if self.training:
                self._observe(queries, codes[..., None])
            return values.view(x.shape[0], *(shape if pool != "none" else x.shape[1:2]), values.shape[-1])
        indices, distances = self._search(queries.detach() if values_only else queries)
        if pool == "none":
            values = self._fetch(self.values, indices, shape)
        else:
            pooled = self._gather(self.values, indices[..., 0], pool, "bscv")
            values = pooled.view(x.shape[0], *shape, pooled.shape[-1])
        output: Tensor | BottleneckOutput = values
        if not values_only:
            fetched = self._fetch(self.keys, indices, shape)
            output = BottleneckOutput(values, fetched, self._unfold(indices, shape), self._unfold(distances, shape))
        if self.training:
            self._observe(queries, indices)
        return output

    def encode(self, x: Tensor, *, dtype: torch.dtype | str = torch.int64) -> Tensor:
        """The indices that ``forward`` would fetch: x [B, C, *shape, D] -> [B, C, *shape] (topk axis after C).

        Neither keys nor counts change. Train on the result with ``decode``: no search at all.

        Args:
            dtype: torch.int64, int32 or int16, or "auto" for the smallest of the last two that holds K - 1.
        Raises:
            as ``forward``; ValueError: dtype too small.
        """
        storage = validation.code_dtype(dtype, self.key_value_pairs_per_codebook)
        queries = self._queries(x)
        self._require_keys()
        return self._unfold(self._search(queries)[0].to(storage), x.shape[2:-1])

    def encode_dataset(
        self,
        data: Tensor | Iterable[Any],
        *,
        dtype: torch.dtype | str = "auto",
        out: str | os.PathLike[str] | None = None,
        inputs_extractor: Callable[[Any], Any] | None = None,
        progress: bool = True,
    ) -> CodeDataset:
        """The codes of a whole data set, searched once: read in batches, kept as small integers on the host.

        Equivalent to ``CodeDataset(torch.cat([encode(x, dtype=dtype) for x, y in data]), torch.cat([y ...]))``.

        Args:
            data: a tensor [N, C, *shape, D], or an iterable (a DataLoader, say) of [B, C, *shape, D] or of
                (x, labels, ...) items, read once; the labels are kept where they are tensors of length B.
            dtype: as for ``encode``; "auto" is int16 up to K = 32768, int32 above.
            out: a file (.npy) to write the codes to as they come; the result is then a map of it. None keeps them in
                memory. ``CodeDataset.open`` maps the file again.
            inputs_extractor: takes x out of an item of ``data``; its first element by default.
            progress: show a progress bar.
        Returns:
            a ``CodeDataset``: codes [N, C, *shape] (topk axis after C), labels [N, ...] or None.
        Raises:
            as ``encode``; TypeError: data that is no tensor and cannot be iterated. ValueError: no samples, samples of
            different shapes, or labels in some items only.
        """
        storage = validation.code_dtype(dtype, self.key_value_pairs_per_codebook)

        def search(x: Any) -> Tensor:
            return self.encode(x.to(self.keys.device) if isinstance(x, Tensor) else x, dtype=storage)

        return encode(data, search, cut=key_learning.cut, out=out, inputs_extractor=inputs_extractor, progress=progress)

    def decode(self, indices: Tensor, pool: str = "none") -> Tensor:
        """The values of cached indices: [B, C, *shape] -> [B, C, *shape, V], pooled over codebooks [B, *shape, V].

        Equivalent to ``values[arange(C), indices]`` and ``.mean(1)`` or ``.sum(1)``; differentiable for ``values``.

        Raises:
            TypeError: not integers. ValueError: shape or pool. IndexError: an index outside [0, K).
        """
        validation.integer("decode", "indices", indices)
        validation.codes(indices, self.num_codebooks)
        validation.choice("pool", pool, functional.POOLS)
        validation.same_device("indices", indices, "values", self.values)
        shape = indices.shape[2:]
        flat = indices.reshape(*indices.shape[:2], shape.numel()).transpose(1, 2)
        out = self._gather(self.values, flat, pool, "bcsv")
        return out.view(*(indices.shape if pool == "none" else (indices.shape[0], *shape)), out.shape[-1])

    def _queries(self, x: Tensor) -> Tensor:
        """x [B, C, *shape, D] as [B, S, C, D], without a copy for both seed layouts."""
        owner = type(self).__name__
        validation.floating(owner, "x", x)
        keys = self.keys
        validation.split_features(x, keys.shape[0], keys.shape[2])
        validation.same_device("x", x, "keys", keys)
        if self.check_finite:
            validation.finite("x", x)
        if x.dim() == 3:
            flat = x.unsqueeze(1)
        else:
            flat = x.reshape(*x.shape[:2], x.shape[2:-1].numel(), x.shape[-1]).transpose(1, 2)
        return flat if flat.stride(-1) == 1 else flat.contiguous()

    def _search(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and distances [B, S, C, T]."""
        mask = self._search_mask()
        if self.sample_codebook_temperature > 0:
            seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")
            return torch.ops.kvb.sample(queries, self.keys, mask, self.sample_codebook_temperature, seed, self.topk)
        return torch.ops.kvb.nearest(queries, self.keys, self._packed_keys(), mask, self.topk)

    def _in_one_pass(self, pool: str, shape: torch.Size) -> bool:
        """Whether ``lookup`` gives the values as they are wanted: not with codebooks before more than one position."""
        nearest = self.topk == 1 and self.sample_codebook_temperature == 0
        return nearest and not self.sparse_grad and (pool != "none" or len(shape) == 0)

    def _gather(self, table: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
        fetch = ops.gather_row_grad if self.sparse_grad else torch.ops.kvb.gather
        return fetch(table, indices, pool, layout)

    def _fetch(self, table: Tensor, indices: Tensor, shape: Iterable[int]) -> Tensor:
        """Rows of table [C, K, *] at indices [B, S, C, T], as [B, C, (T), *shape, *]."""
        B, S, C, T = indices.shape
        positions = indices.permute(0, 3, 1, 2).reshape(B, T * S, C)
        fetched = self._gather(table, positions, "none", "bcsv")
        return fetched.view(B, C, *self._ranks(), *shape, table.shape[-1])

    def _unfold(self, found: Tensor, shape: Iterable[int]) -> Tensor:
        """[B, S, C, T] as contiguous [B, C, (T), *shape]."""
        B, _, C, _ = found.shape
        return found.permute(0, 2, 3, 1).reshape(B, C, *self._ranks(), *shape).contiguous()

    def _ranks(self) -> tuple[int, ...]:
        return (self.topk,) if self.topk > 1 else ()

    def _search_mask(self) -> Tensor | None:
        """The pairs that may be fetched: the manual mask, and the counted ones while counts are deactivated."""
        if self.update_keys or self.count_cluster_size:
            return self.pair_mask
        counted = self.cluster_size_counter > 0
        return counted if self.pair_mask is None else counted & self.pair_mask

    # --- packed keys: a plain attribute, never saved, copied or shared ------------------------------------------------

    def _forget_packed(self) -> None:
        self._packed: tuple[Tensor, int, Tensor] | None = None  # keys, their version, their packed form

    def _packed_keys(self) -> Tensor:
        current = self.keys
        # A traced graph packs for itself, and an inference tensor has no version that would show a change.
        if torch.compiler.is_compiling() or current.is_inference():
            return torch.ops.kvb.pack_keys(current)
        known = self._packed
        if known is not None and known[0] is current and known[1] == current._version:
            return known[2]
        return self._keep_packed(torch.ops.kvb.pack_keys(current))

    def _keep_packed(self, packed: Tensor) -> Tensor:
        """Search with ``packed`` as long as the keys stay what they are now."""
        if not (torch.compiler.is_compiling() or self.keys.is_inference()):
            self._packed = self.keys, self.keys._version, packed
        return packed

    def refresh_keys(self: _Self) -> _Self:
        """Call after writing keys through ``.data``, the one change that cannot be noticed; returns self."""
        self._forget_packed()
        return self

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before = {name: getattr(self, name) for name in ("keys", "keys_avg", "cluster_size", "cluster_size_counter")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype in (torch.float16, torch.bfloat16) and old.dtype.itemsize > new.dtype.itemsize:
                setattr(self, name, old.to(new.device))  # moving averages and counts are lost in half precision
        return self.refresh_keys()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    # --- learning the keys --------------------------------------------------------------------------------------------

    def _observe(self, queries: Tensor, indices: Tensor) -> None:
        """Learn the keys or count the hits of one batch in training mode; indices [B, S, C, T]."""
        if self.update_keys:
            self._learn(queries.detach(), indices[..., 0])
        elif self.count_cluster_size:
            for t in range(indices.shape[-1]):
                hits = torch.ops.kvb.count(queries.detach(), indices[..., t], self.key_value_pairs_per_codebook)
                self.cluster_size_counter.add_(hits)

    def _learn(self, queries: Tensor, indices: Tensor) -> None:
        """One step of the moving averages, taken by every process, also by one with an empty batch."""
        self._forget_packed()  # before the statistics need memory
        statistics = torch.ops.kvb.accumulate(queries, indices, self.key_value_pairs_per_codebook)
        packed = key_learning.update(
            *(self.keys, self.keys_avg, self.cluster_size),
            *(*key_learning.sync_statistics(*statistics), queries),
            decay=self.decay,
            eps=self.eps,
            threshold=self.threshold_ema_dead_code,
        )
        self._keep_packed(packed)

    def _initialise_from(self, batch: Tensor) -> None:
        """The first batch in training mode initialises keys that wait for data."""
        if not (self.training and self.update_keys):
            self._require_keys()
        if batch.numel() > 0:
            self.init_keys(batch.detach(), epochs=0, progress=False)

    def _require_keys(self) -> None:
        if not self._initialised:
            raise RuntimeError("keys are not initialised: call init_keys(...) or run one batch in training mode")

    def init_keys(
        self,
        data: Tensor | Iterable[Any],
        method: str | None = None,
        *,
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> key_learning.KeyReport:
        """Initialise the keys from data, then let them learn for ``epochs`` passes of moving averages.

        "random" keeps the keys (standard normal, if there are none yet); "sample" takes random rows; "kmeans" and
        "kmeans++" run ``kmeans_iters`` iterations on the first 64*K rows. Data is streamed and read once a pass.
        Rows with NaN or Inf are skipped. Values and counts do not change.

        Args:
            data: a tensor [B, C, *shape, D], or an iterable (a DataLoader, say) of them or of (tensor, ...) items.
            method: one of the ``init_mode``s; None takes the module's.
            epochs: passes of moving averages with dead-code replacement; 0 for none.
            inputs_extractor: takes the tensor out of an item of ``data``; its first element by default.
            generator: makes "sample" and "kmeans" reproducible.
            progress: show a progress bar.
        Returns:
            a ``KeyReport`` (inertia, dead codes), measured on the last pass.
        Raises:
            RuntimeError: the keys are frozen. ValueError: no rows, none finite, or a one-shot iterator where several
            passes are needed.
        """
        method = validation.choice("method", method or self.init_mode, key_learning.METHODS)
        validation.epochs(epochs)
        if not self.update_keys:
            raise RuntimeError("keys are frozen: call unfreeze_keys() before init_keys(...)")
        stream = key_learning.Stream(
            data,
            lambda x: self._queries(x.to(self.keys.device) if isinstance(x, Tensor) else x),
            inputs_extractor,
            passes=key_learning.passes_needed(method, self.kmeans_iters, epochs),
            progress=progress,
        )
        K, like = self.key_value_pairs_per_codebook, self.keys
        if method == "sample":
            self._start_from(key_learning.sample_keys(stream, K, like, generator))
        elif method in ("kmeans", "kmeans++"):
            plus = method == "kmeans++"
            found = key_learning.kmeans(stream, K, like, iters=self.kmeans_iters, plus=plus, generator=generator)
            self._start_from(found)
        elif not self._initialised:
            self._start_from(torch.randn(like.shape, generator=generator).to(like))
        for epoch in range(max(1, epochs)):
            meter = key_learning.Meter(like)
            for queries in stream.queries("moving averages" if epoch < epochs else "measuring"):
                with torch.no_grad():
                    indices, distances = torch.ops.kvb.nearest(
                        queries, self.keys, self._packed_keys(), self._search_mask(), 1
                    )
                    meter.add(indices[..., 0], distances[..., 0], queries)
                    if epoch < epochs:
                        self._learn(queries, indices[..., 0])
        return meter.report(method)

    def _start_from(self, fresh: Tensor) -> None:
        """New keys with the statistics of a new module."""
        with torch.no_grad():
            self.keys.copy_(fresh)
            self.keys_avg.copy_(fresh)
            self.cluster_size.fill_(1)
            self.initted.fill_(1)
        self._initialised = True
        self._forget_packed()

    # --- modes; each returns self -------------------------------------------------------------------------------------

    def freeze_keys(self: _Self) -> _Self:
        """Keys stop learning, and forwards in training mode count hits instead.

        Raises:
            RuntimeError: the keys still await their initialisation from data.
        """
        self._require_keys()
        self.update_keys = False
        self._packed_keys()
        return self

    def unfreeze_keys(self: _Self) -> _Self:
        """Keys learn again on forwards in training mode."""
        self.update_keys = True
        return self

    def enable_update_keys(self: _Self) -> _Self:
        """The published name of ``unfreeze_keys``."""
        return self.unfreeze_keys()

    def disable_update_keys(self: _Self) -> _Self:
        """The published name of ``freeze_keys``."""
        return self.freeze_keys()

    def activate_counts(self: _Self) -> _Self:
        """Count fetched pairs on forwards in training mode with frozen keys; every pair may be fetched."""
        self.count_cluster_size = True
        return self

    def deactivate_counts(self: _Self) -> _Self:
        """Stop counting, and restrict the search with frozen keys to pairs counted so far.

        Raises:
            RuntimeError: nothing was counted yet, so that nothing could be fetched.
        """
        if not bool((self.cluster_size_counter > 0).any()):
            raise RuntimeError(
                "no pair was counted yet, so deactivate_counts() would leave nothing to fetch: "
                "run batches in training mode with frozen keys first"
            )
        self.count_cluster_size = False
        return self

    def reset_cluster_size_counter(self: _Self) -> _Self:
        """Forget all counts, and count again."""
        self.cluster_size_counter.zero_()
        return self.activate_counts()

    def mask_pairs(self: _Self, mask: Tensor | None) -> _Self:
        """Restrict the search to pairs where ``mask`` [C, K] (bool) is True; None lifts it. Saved with the module."""
        if mask is not None:
            validation.mask("mask_pairs", mask, self.num_codebooks, self.key_value_pairs_per_codebook)
            mask = mask.to(self.keys.device, copy=True)
        self.pair_mask = mask
        return self

    # --- what was used ------------------------------------------------------------------------------------------------

    def fraction_of_unused_keys(self) -> Tensor:
        """The share of all pairs that were never counted."""
        return (self.cluster_size_counter == 0).sum() / self.cluster_size_counter.numel()

    def usage(self) -> Tensor:
        """The share [C, K] of a codebook's counted hits that each pair got; zeros for a codebook without counts."""
        total = self.cluster_size_counter.sum(-1, keepdim=True)
        return self.cluster_size_counter / total.clamp(min=1)

    def perplexity(self) -> Tensor:
        """exp(entropy of ``usage``) [C]: the number of pairs in effective use, 1 to K; 0 without counts."""
        usage = self.usage()
        entropy = -torch.special.xlogy(usage, usage).sum(-1)
        return torch.where(usage.sum(-1) > 0, entropy.exp(), 0)

    def extra_repr(self) -> str:
        megabytes = self.values.numel() * self.values.element_size() / 1e6
        state = "learning" if self.update_keys else "frozen"
        return (
            f"{self.num_codebooks} codebooks x {self.key_value_pairs_per_codebook} pairs, "
            f"keys {self.dim_keys}-d {state}{'' if self._initialised else ' (not initialised)'}, "
            f"values {self.dim_values}-d ({megabytes:.4g} MB), topk={self.topk}, "
            f"backend={ops.backend(self.keys.device.type)}"
        )

    # --- state_dict ---------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + STATE_NAME] = self._pack_state()

    def _pack_state(self) -> Tensor:
        mask = self.pair_mask
        flags = [STATE_VERSION, self._initialised, self.update_keys, self.count_cluster_size, mask is not None]
        header = torch.tensor([int(flag) for flag in flags] + [0] * (_HEADER - len(flags)), dtype=torch.uint8)
        if mask is None:
            return header
        bits = nn.functional.pad(mask.cpu().flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
        return torch.cat([header, (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)])

    def _state_problem(self, state: Tensor) -> str | None:
        pairs = self.num_codebooks * self.key_value_pairs_per_codebook
        if state.dtype != torch.uint8 or state.dim() != 1 or len(state) < _HEADER:
            return f"expected {STATE_NAME} of at least {_HEADER} bytes, got {state.dtype} {tuple(state.shape)}"
        version, *flags = state[: _HEADER - 3].tolist()
        if version != STATE_VERSION:
            return f"{STATE_NAME} has version {version}, but this kvb reads version {STATE_VERSION}: upgrade kvb"
        want = _HEADER + (-(-pairs // 8) if flags[3] else 0)
        if max(flags) > 1 or len(state) != want:
            got = f"{flags} and {len(state)} bytes"
            return f"{STATE_NAME} is damaged: expected flags of 0 or 1 and {want} bytes, got {got}"
        return None

    def _unpack_state(self, state: Tensor) -> None:
        _, self._initialised, self.update_keys, self.count_cluster_size, masked = map(bool, state[: _HEADER - 3])
        mask = None
        if masked:
            bits = (state[_HEADER:, None].cpu() >> torch.arange(8, dtype=torch.uint8)) & 1
            pairs = (self.num_codebooks, self.key_value_pairs_per_codebook)
            mask = bits.flatten()[: pairs[0] * pairs[1]].view(pairs).bool()
        self.mask_pairs(mask)

    def _problems(self, incoming: dict[str, Any]) -> list[str]:
        """Why these entries cannot be loaded; nothing was changed yet."""
        problems = []
        for name, current in [*self._parameters.items(), *self._buffers.items()]:
            value = incoming.get(name)
            if name in self._non_persistent_buffers_set or current is None or value is None:
                continue
            if not isinstance(value, Tensor):
                problems.append(f'While copying "{name}", expected torch.Tensor but received {type(value)}')
            elif value.shape != current.shape:
                problems.append(
                    f"size mismatch for {name}: copying a param with shape {value.shape} from checkpoint, "
                    f"the shape in current model is {current.shape}."
                )
            elif name in ("keys", "keys_avg") and not value.isfinite().all():
                bad = int((~value.isfinite().all(-1)).sum())
                problems.append(f"{name} contains NaN or Inf in {bad} of {value[..., 0].numel()} pairs")
            elif name in ("cluster_size", "cluster_size_counter") and not (value >= 0).all():
                problems.append(f"{name} holds negative or NaN counts")
        if isinstance(incoming.get(STATE_NAME), Tensor) and (problem := self._state_problem(incoming[STATE_NAME])):
            problems.append(problem)
        return problems

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``torch.nn.Module.load_state_dict``, but all or nothing: what does not fit changes nothing.

        Raises:
            RuntimeError: strict and names missing or left over; shapes that differ; keys with NaN or Inf; negative
            counts; a ``kvb_state`` that is damaged or of a newer version.
        """
        expected = {*self._parameters, *self._buffers} - self._non_persistent_buffers_set
        complaints = {
            "Missing key(s) in state_dict": sorted(expected - state_dict.keys()),
            "Unexpected key(s) in state_dict": sorted(state_dict.keys() - expected - {STATE_NAME}),
        }
        if strict and any(complaints.values()):
            lines = [
                f"{what}: " + ", ".join(f'"{name}"' for name in names) for what, names in complaints.items() if names
            ]
            raise RuntimeError(f"Error(s) in loading state_dict for {type(self).__name__}:\n\t" + ". \n\t".join(lines))
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Also called for a bottleneck inside another module; ``rest`` ends with the list of error messages."""
        incoming = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        state = state_dict.pop(prefix + STATE_NAME, None)
        if problems := self._problems(incoming):
            rest[-1].extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if "initted" in incoming:
            self._initialised = bool(incoming["initted"].any())
        if state is not None:
            self._unpack_state(state)
        self._forget_packed()
