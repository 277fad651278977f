"""``KeyValueBottleneck``: the lookup, and keys that learn. The maths lives in the operators and in ``key_learning``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kvb import functional, ops, validation
from kvb._torch import register_namedtuple
from kvb.modules import key_learning, recomputation
from kvb.modules.datasets import ReadsData
from kvb.modules.state import BottleneckState
from kvb.modules.streams import Stream

_Self = TypeVar("_Self", bound="KeyValueBottleneck")


class BottleneckOutput(NamedTuple):
    """What ``KeyValueBottleneck`` returns with ``return_values_only=False``; a topk axis follows C if topk > 1."""

    values: Tensor  # [B, C, *shape, V]
    keys: Tensor  # [B, C, *shape, D]
    indices: Tensor  # [B, C, *shape] int64
    distances: Tensor  # [B, C, *shape] squared L2


# torch.export.save needs a name for the output type.
register_namedtuple(BottleneckOutput, serialized_type_name="kvb.BottleneckOutput")


class KeyValueBottleneck(ReadsData, BottleneckState):
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
        values [C, K, V] parameter; buffers initted [1], cluster_size [C, K], keys_avg [C, K, D], keys [C, K, D]
        float32 and cluster_size_counter [C, K] int64: the published names. Keys and their statistics are float32 with
        every default dtype, and stay so under ``half()`` and ``bfloat16()``. Buffers kvb_flags [3] and kvb_mask [C, K]
        hold whether keys learn, whether hits are counted, and the mask of ``mask_pairs``; a state_dict without them
        loads too, and leaves all that as it is.
    Not for two threads at once while keys learn or are counted; eval-mode forwards are safe.

    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
    """

    values: nn.Parameter

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
        infinity = float("inf")
        C = validation.positive_int("num_codebooks", num_codebooks)
        K = validation.positive_int("key_value_pairs_per_codebook", key_value_pairs_per_codebook)
        D = validation.positive_int("dim_keys", dim_keys)
        V = validation.positive_int("dim_values", dim_values)
        validation.choice("init_mode", init_mode, key_learning.METHODS)
        with torch.inference_mode(False):  # tensors made in inference mode could never learn
            super().__init__(C, K, D, initialised=init_mode == "random")
            self.values = nn.Parameter(torch.randn(C, K, V))
        self.init_mode = init_mode
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

    @property
    def dim_values(self) -> int:
        """V: that of the tensor, which may be exchanged for another."""
        return self.values.shape[2]

    # --- lookup -------------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, *, pool: str = "none", return_values_only: bool | None = None
    ) -> Tensor | BottleneckOutput:
        """x [B, C, *shape, D] -> values [B, C, *shape, V], or a ``BottleneckOutput``.

        Gradients reach ``values``; ``x`` gets one through ``distances`` only. A topk slot for which no pair is usable
        has the value zero, and the distance +inf.

        Args:
            pool: "mean" or "sum" over codebooks, without the unpooled values in between: values [B, *shape, V].
            return_values_only: overrides the module's for this call.
        Raises:
            TypeError: not a floating-point tensor. ValueError: its shape does not fit, or ``check_finite`` found NaN.
            RuntimeError: another device, or keys that still wait for data in eval mode.
        """
        validation.choice("pool", pool, functional.POOLS)
        values_only = self.return_values_only if return_values_only is None else return_values_only
        queries = self._queries(x)
        self._look()
        if not self._initialised:
            self._initialise_from(x)
        keys, packed = self._keys_for(queries, learns=self.training and self._learning)
        shape = x.shape[2:-1]
        if values_only and self._in_one_pass(pool, shape):
            values, codes = ops.lookup(queries, keys, packed, self.values, self._usable, pool)
            del packed  # its memory is that of the keys' next packed form
            if self.training:
                self._observe(queries, codes[..., None])
            return values.view(x.shape[0], *(shape if pool != "none" else x.shape[1:2]), values.shape[-1])
        indices, distances = self._search(queries.detach() if values_only else queries, keys, packed)
        del packed
        output: Tensor | BottleneckOutput
        output = values = self._fetch_values(indices, shape, pool)
        if not values_only:
            fetched = self._fetch(keys, indices, shape)
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
        return self._unfold(self._search(queries, *self._packed_keys())[0].to(storage), x.shape[2:-1])

    def decode(self, indices: Tensor, pool: str = "none") -> Tensor:
        """The values of cached indices: [B, C, *shape] -> [B, C, *shape, V], pooled over codebooks [B, *shape, V].

        Equivalent to ``values[arange(C), indices]`` and ``.mean(1)`` or ``.sum(1)``; differentiable for ``values``.
        With topk above the pairs that a mask leaves, masked ones have the value zero, as in ``forward``.

        Raises:
            TypeError: not integers. ValueError: shape or pool. IndexError: an index outside [0, K).
        """
        validation.integer("decode", "indices", indices)
        validation.codes(indices, self.num_codebooks)
        validation.choice("pool", pool, functional.POOLS)
        validation.same_device("indices", indices, "values", self.values)
        shape = indices.shape[2:]
        flat = indices.reshape(*indices.shape[:2], shape.numel()).transpose(1, 2)
        usable = self._search_mask()
        if self.topk > 1 and usable is not None and self._fewest < self.topk:
            out = self._decode_usable(flat, usable)
            out = out if pool == "none" else getattr(out, pool)(1)
        else:
            out = self._gather(self.values, flat, pool, "bcsv")
        return out.view(*(indices.shape if pool == "none" else (indices.shape[0], *shape)), out.shape[-1])

    def _queries(self, x: Tensor) -> Tensor:
        """x [B, C, *shape, D] as [B, S, C, D], without a copy for both seed layouts."""
        owner = type(self).__name__
        validation.floating(owner, "x", x)
        validation.split_features(x, self.num_codebooks, self.dim_keys)
        validation.same_device("x", x, "keys", self._taken_quietly("initted"))
        if self.check_finite:
            validation.finite("x", x)
        if x.dim() == 3:
            flat = x.unsqueeze(1)
        else:
            flat = x.reshape(*x.shape[:2], x.shape[2:-1].numel(), x.shape[-1]).transpose(1, 2)
        return flat if flat.stride(-1) == 1 else flat.contiguous()

    def _keys_for(self, queries: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        """The keys to search, and their packed form: the current ones, or in a recomputation those of before."""
        if not learns:
            return self._packed_keys()
        if recomputation.in_backward():
            return self._forwards.recall(queries)
        keys, packed = self._packed_keys()
        if recomputation.under_checkpoint():
            self._forwards.remember(queries, keys, packed)
        return keys, packed

    def _search(self, queries: Tensor, keys: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and distances [B, S, C, T]."""
        mask = self._usable
        if self.sample_codebook_temperature > 0:
            seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")
            return torch.ops.kvb.sample(queries, keys, mask, self.sample_codebook_temperature, seed, self.topk)
        return torch.ops.kvb.nearest(queries, keys, packed, mask, self.topk)

    def _in_one_pass(self, pool: str, shape: torch.Size) -> bool:
        """Whether ``lookup`` gives the values as they are wanted: not with codebooks before more than one position."""
        nearest = self.topk == 1 and self.sample_codebook_temperature == 0 and self._fewest > 0
        return nearest and not self.sparse_grad and (pool != "none" or len(shape) == 0)

    def _present(self) -> Tensor | None:
        """Which ranks of a search find a usable pair, [C, T]; None where all do."""
        if self._usable is None or self._fewest >= self.topk:
            return None
        return torch.arange(self.topk, device=self._usable.device) < self._usable.sum(-1, keepdim=True)

    def _gather(self, table: Tensor, indices: Tensor, pool: str, layout: str) -> Tensor:
        fetch = ops.gather_row_grad if self.sparse_grad else torch.ops.kvb.gather
        return fetch(table, indices, pool, layout)

    def _fetch_values(self, indices: Tensor, shape: torch.Size, pool: str) -> Tensor:
        """Values at indices [B, S, C, T], as [B, C, (T), *shape, V], or pooled over C."""
        present = self._present()
        if present is None:
            return self._fetch(self.values, indices, shape, pool)
        # The first rank in place of one that found nothing: no masked row is read, and none gets a gradient.
        fetched = self._fetch(self.values, torch.where(present, indices, indices[..., :1]), shape)
        fetched = torch.where(self._unfold(present.expand_as(indices), shape)[..., None], fetched, 0)
        return fetched if pool == "none" else getattr(fetched, pool)(1)

    def _decode_usable(self, indices: Tensor, usable: Tensor) -> Tensor:
        """Values [B, C, M, V] at indices [B, M, C]; a masked pair stands for a rank that found none, as in a search."""
        present = torch.ops.kvb.gather(usable[..., None].float(), indices, "none", "bcsv") > 0
        some = usable.to(torch.uint8).argmax(-1)
        safe = torch.where(present[..., 0].transpose(1, 2), indices, some)
        return torch.where(present, self._gather(self.values, safe, "none", "bcsv"), 0)

    def _fetch(self, table: Tensor, indices: Tensor, shape: Iterable[int], pool: str = "none") -> Tensor:
        """Rows of table [C, K, *] at indices [B, S, C, T], as [B, C, (T), *shape, *], or pooled over C."""
        B, S, C, T = indices.shape
        positions = indices.permute(0, 3, 1, 2).reshape(B, T * S, C)
        fetched = self._gather(table, positions, pool, "bcsv")
        books = (C,) if pool == "none" else ()
        return fetched.view(B, *books, *self._ranks(), *shape, table.shape[-1])

    def _unfold(self, found: Tensor, shape: Iterable[int]) -> Tensor:
        """[B, S, C, T] as contiguous [B, C, (T), *shape]."""
        B, _, C, _ = found.shape
        return found.permute(0, 2, 3, 1).reshape(B, C, *self._ranks(), *shape).contiguous()

    def _ranks(self) -> tuple[int, ...]:
        return (self.topk,) if self.topk > 1 else ()

    # --- learning the keys --------------------------------------------------------------------------------------------

    def _target(self) -> KeyValueBottleneck:
        return self

    def _features(self, inputs: Any) -> Any:
        return inputs

    def _heads(self, features: Any) -> Any:
        return features

    def _observe(self, queries: Tensor, indices: Tensor) -> None:
        """Learn the keys or count the hits of one batch in training mode; indices [B, S, C, T]."""
        if recomputation.in_backward():
            return  # the forward that runs again has been observed
        if self._learning:
            self._learn(queries.detach(), indices[..., 0])
        elif self._counting:
            present = self._present()
            for t in range(indices.shape[-1]):
                hits = torch.ops.kvb.count(queries.detach(), indices[..., t], self.key_value_pairs_per_codebook)
                self._taken_quietly("cluster_size_counter").add_(
                    hits if present is None else hits * present[:, t, None]
                )

    def _learn(self, queries: Tensor, indices: Tensor) -> None:
        """One step of the moving averages, taken by every process, also by one with an empty batch."""
        self._packed.release()  # before the statistics need memory
        packed = key_learning.step(self._moving(), queries, indices, self._usable, self._rates())
        self._keep_packed(packed)

    def _moving(self) -> tuple[Tensor, Tensor, Tensor]:
        """What moves: keys, keys_avg, cluster_size."""
        keys, keys_avg, cluster_size = map(self._taken_quietly, ("keys", "keys_avg", "cluster_size"))
        return keys, keys_avg, cluster_size

    def _rates(self) -> key_learning.Rates:
        return key_learning.Rates(self.decay, self.eps, self.threshold_ema_dead_code)

    def _initialise_from(self, batch: Tensor) -> None:
        """The first batch in training mode initialises keys that wait for data."""
        if not (self.training and self._learning):
            self._require_keys()
        if batch.numel() > 0:
            self.init_keys(batch.detach(), epochs=0, progress=False)

    def _require_keys(self) -> None:
        self._look()
        if not self._initialised:
            raise RuntimeError("keys are not initialised: call init_keys(...) or run one batch in training mode")

    @torch.no_grad()
    def _initialise(
        self, stream: Stream, method: str, epochs: int, generator: torch.Generator | None
    ) -> key_learning.KeyReport:
        """``init_keys`` on copies, which become the state when all went well."""
        keys, keys_avg, cluster_size = (part.clone() for part in self._moving())
        moving = keys, keys_avg, cluster_size
        report = key_learning.initialise(
            moving,
            stream,
            method,
            fresh=not self._initialised,
            kmeans_iters=self.kmeans_iters,
            epochs=epochs,
            mask=self._usable,
            rates=self._rates(),
            generator=generator,
        )
        self._commit(*moving)
        return report

    def _commit(self, keys: Tensor, keys_avg: Tensor, cluster_size: Tensor) -> None:
        """Make them the state of keys that are initialised."""
        for name, part in (("keys", keys), ("keys_avg", keys_avg), ("cluster_size", cluster_size)):
            self._write(name, part)
        self._write("initted", torch.ones(1))
        self._packed.forget()
        self._look()

    # --- modes; each returns self -------------------------------------------------------------------------------------

    def freeze_keys(self: _Self) -> _Self:
        """Keys stop learning, and forwards in training mode count hits instead.

        Raises:
            RuntimeError: the keys still await their initialisation from data.
        """
        self._require_keys()
        self._set_flags(learning=False)
        self._packed_keys()
        return self

    def unfreeze_keys(self: _Self) -> _Self:
        """Keys learn again on forwards in training mode."""
        self._set_flags(learning=True)
        return self

    def enable_update_keys(self: _Self) -> _Self:
        """The published name of ``unfreeze_keys``."""
        return self.unfreeze_keys()

    def disable_update_keys(self: _Self) -> _Self:
        """The published name of ``freeze_keys``."""
        return self.freeze_keys()

    def activate_counts(self: _Self) -> _Self:
        """Count fetched pairs on forwards in training mode with frozen keys; every pair may be fetched."""
        self._set_flags(counting=True)
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
        self._set_flags(counting=False)
        return self

    def reset_cluster_size_counter(self: _Self) -> _Self:
        """Forget all counts, and count again."""
        self._write("cluster_size_counter", torch.zeros((), dtype=torch.int64))
        return self.activate_counts()

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
        table = getattr(self, "values", None)  # which users exchange, and may have deleted
        values = "no values" if table is None else f"values {table.shape[-1]}-d ({table.nbytes / 1e6:.4g} MB)"
        state = "frozen" if self.keys_frozen else "learning"
        return (
            f"{self.num_codebooks} codebooks x {self.key_value_pairs_per_codebook} pairs, "
            f"keys {self.dim_keys}-d {state}{'' if self._initialised else ' (not initialised)'}, "
            f"{values}, topk={self.topk}, backend={ops.backend(self._device.type)}"
        )
