"""``KeyValueBottleneck``: the lookup, and keys that learn. The maths lives in the operators and in ``key_learning``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from kvb import collectives, functional, ops, validation
from kvb.collectives import Group
from kvb.functional import Pool
from kvb.modules import fully_sharded, key_learning, positions, recomputation
from kvb.modules.datasets import ReadsData
from kvb.modules.hub import OnHub
from kvb.modules.learning import LearnsKeys
from kvb.modules.outputs import BottleneckOutput, Lookup
from kvb.modules.streams import Part
from kvb.modules.tables import VALUES_STARTS, Tables, ValuesStart, start_
from kvb.modules.tracing import OneNode


class KeyValueBottleneck(OnHub, ReadsData, OneNode, LearnsKeys, Tables):
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
        threshold_ema_dead_code: pairs whose moving hit count falls below it are replaced by queries of the batch;
            ``kvb.dead_code_threshold`` makes one of the sizes.
        sample_codebook_temperature: > 0 draws ``topk`` keys from softmax(-distance / temperature), without replacement,
            instead of the nearest.
        return_values_only: return a tensor, or else a ``BottleneckOutput``.
        topk: how many nearest pairs to fetch; > 1 adds an axis after C.
        init_values: "random" (standard normal, as published) or "zeros". Take "zeros" where values are votes for
            classes: random ones outvote what few examples teach.
        sparse_grad: give ``values`` a sparse gradient: the rows fetched, merged, never a dense [C, K, V]. For the
            optimizers and ``clip_grad_norm_`` of ``kvb.optim``, ``torch.optim.SGD`` and ``SparseAdam``; one graph break
            under ``torch.compile``.
        check_finite: raise ValueError when an input holds NaN or Inf. Reads the data: the host waits for the device.
        process_group: the processes of ``torch.distributed`` that learn the keys and count hits together, as one would
            on all their batches: None for those of the ``DistributedDataParallel`` around this module, or for all;
            False for this process alone.
        pool: what ``forward`` and ``decode`` do with codebooks unless a call says so: "none", "mean" or "sum".
        device: of all tensors.
        dtype: of ``values``.
    Shape:
        x [B, C, *shape, D] -> values [B, C, *shape, V]; pooled [B, *shape, V].
    State:
        values [C, K, V] parameter; buffers initted [1], cluster_size [C, K], keys_avg [C, K, D], keys [C, K, D]
        float32 and cluster_size_counter [C, K] int64: the published names. Keys and their statistics are float32 with
        every default dtype, and stay so under ``half()`` and ``bfloat16()``. Buffers kvb_flags [3] and kvb_mask [C, K]
        hold whether keys learn, whether hits are counted, and the mask of ``mask_pairs``; a state_dict without them
        loads too, and leaves all that as it is.
    Not for two threads at once while keys learn or are counted; eval-mode forwards are safe.

    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10, init_mode="sample")
        >>> report = bottleneck.init_keys(torch.randn(100, 4, 8), progress=False)
        >>> values = bottleneck.freeze_keys()(torch.randn(5, 4, 8))  # a decoder makes logits of them
        >>> values.shape
        torch.Size([5, 4, 10])
        >>> bottleneck(torch.randn(5, 4, 8), pool="mean").shape
        torch.Size([5, 10])
    """

    __call__: Lookup
    init_values: ValuesStart
    pool: Pool = "none"  # also of a module pickled before there was a choice
    values: nn.Parameter
    kmeans_iters: int
    decay: float
    eps: float
    sample_codebook_temperature: float
    topk: int

    def __init__(
        self,
        num_codebooks: int,
        key_value_pairs_per_codebook: int,
        dim_keys: int,
        dim_values: int,
        init_mode: key_learning.Method = "random",
        kmeans_iters: int = 10,
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        sample_codebook_temperature: float = 0.0,
        return_values_only: bool = True,
        topk: int = 1,
        *,
        init_values: ValuesStart = "random",
        sparse_grad: bool = False,
        check_finite: bool = False,
        process_group: Group = None,
        pool: Pool = "none",
        device: validation.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        infinity = float("inf")
        C = validation.positive_int("num_codebooks", num_codebooks)
        K = validation.positive_int("key_value_pairs_per_codebook", key_value_pairs_per_codebook)
        D = validation.positive_int("dim_keys", dim_keys)
        V = validation.positive_int("dim_values", dim_values)
        validation.choice("init_mode", init_mode, key_learning.METHODS)
        dtype = validation.float_dtype(dtype)
        # Tensors created in inference mode cannot learn.
        with torch.inference_mode(False), validation.placed(device):
            super().__init__(C, K, D, initialised=init_mode == "random")
            self.init_values = validation.choice("init_values", init_values, VALUES_STARTS)
            self.values = nn.Parameter(start_(torch.empty(C, K, V, dtype=dtype), self.init_values))
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
        self.process_group = process_group
        self.pool = validation.choice("pool", pool, functional.POOLS)

    @property
    def dim_values(self) -> int:
        """V: the size of the tensor, which may be replaced."""
        return self.values.shape[2]

    def _facts(self) -> dict[str, str]:
        sizes = f"{self.num_codebooks} codebooks of {self.key_value_pairs_per_codebook} pairs"
        facts = {"sizes": f"{sizes}, keys of {self.dim_keys} and values of {self.dim_values} numbers"}
        if not self.keys_initialised:
            return facts | {"keys": "wait for data"}
        perplexity = self.perplexity()
        used = (self.usage() > 0).float().mean()
        return facts | {
            "keys": "frozen" if self.keys_frozen else "learning",
            "pairs in use": f"{used:.1%}",
            "perplexity of a codebook": f"{perplexity.mean():.1f} ({perplexity.min():.1f} to {perplexity.max():.1f})",
        }

    # --- lookup -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        pool: Pool | None = None,
        return_values_only: bool | None = None,
    ) -> Tensor | BottleneckOutput:
        """x [B, C, *shape, D] -> values [B, C, *shape, V], or a ``BottleneckOutput``.

        Gradients reach ``values``; ``x`` gets one through ``distances`` only. A topk slot for which no pair is usable
        has the value zero, and the distance +inf.

        Args:
            mask: bool [B, *shape], True where a position counts. At the others, padding say, values and keys are zero,
                the index is 0, the distance NaN, and there is no gradient; they enter no keys and no counts. Whatever
                x holds there, NaN too, leaves no trace.
            pool: "mean" or "sum" over codebooks, without the unpooled values in between: values [B, *shape, V].
                Overrides the module's for this call, and so does return_values_only.
        Raises:
            TypeError: not a floating-point tensor, or a mask that is not bool. ValueError: a shape does not fit, or
            ``check_finite`` found NaN. RuntimeError: another device, or keys that still wait for data in eval mode.
        """
        if isinstance(x, Proxy):
            return self._call_of(x, mask=mask, pool=pool, return_values_only=return_values_only)
        pool = self._pooled(pool)
        values_only = self.return_values_only if return_values_only is None else return_values_only
        queries = self._queries(x, mask, one_position=values_only and not self.training)
        counted = None if mask is None else mask.reshape(queries.shape[:2])
        self._look()
        if self.training:
            self._meet(queries)
        if not self._initialised:
            self._initialise_from(x, mask)
        learns = self.training and self._learning
        keys, packed = self._keys_for(queries, learns=True) if learns else self._packed_keys()
        if values_only and self._in_one_pass(pool, x.dim() - 3):
            values, codes = ops.lookup(queries, keys, packed, self._table(), self._usable, pool)
            del packed  # its memory is that of the keys' next packed form
            if self.training:
                self._observe(queries, codes[..., None], counted)
            if queries.dim() == 3:
                return values
            values = positions.cleared(values, counted)
            return values.view(x.shape[0], *(x.shape[2:-1] if pool != "none" else codes.shape[2:]), values.shape[-1])
        queries = queries.unsqueeze(1) if queries.dim() == 3 else queries
        indices, distances = self._search(queries.detach() if values_only else queries, keys, packed)
        del packed
        indices = positions.cleared(indices, counted)
        shape, sent = x.shape[2:-1], self._codes_of_all(queries, indices, counted)
        output: Tensor | BottleneckOutput
        output = values = self._fetch_values(indices, shape, pool, counted, sent)
        if not values_only:
            fetched = self._fetch(keys, indices, shape, counted=counted)
            output = BottleneckOutput(values, fetched, self._unfold(indices, shape), self._unfold(distances, shape))
        if self.training:
            self._observe(queries, indices, counted, sent)
        return output

    def encode(
        self, x: Tensor, *, mask: Tensor | None = None, dtype: torch.dtype | Literal["auto"] = torch.int64
    ) -> Tensor:
        """The indices that ``forward`` would fetch: x [B, C, *shape, D] -> [B, C, *shape] (topk axis after C).

        Neither keys nor counts change. Train on the result with ``decode``: no search at all.

        Args:
            mask: as for ``forward``; ``decode`` needs it again, as the index 0 of padding is that of a pair.
            dtype: torch.int64, int32 or int16, or "auto" for the smallest of the last two that holds K - 1.
        Raises:
            as ``forward``; ValueError: dtype too small.
        Examples:
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
            >>> bottleneck.encode(torch.randn(5, 4, 8), dtype="auto").dtype
            torch.int16
        """
        storage = validation.code_dtype(dtype, self.key_value_pairs_per_codebook)
        queries = self._queries(x, mask)
        counted = None if mask is None else mask.reshape(queries.shape[:2])
        self._require_keys()
        indices = positions.cleared(self._search(queries, *self._packed_keys())[0], counted)
        return self._unfold(indices.to(storage), x.shape[2:-1])

    def decode(self, indices: Tensor, pool: Pool | None = None, *, mask: Tensor | None = None) -> Tensor:
        """The values of cached indices: [B, C, *shape] -> [B, C, *shape, V], pooled over codebooks [B, *shape, V].

        Equivalent to ``values[arange(C), indices]`` and ``.mean(1)`` or ``.sum(1)``; differentiable for ``values``.
        With topk above the pairs that ``mask_pairs`` leaves, the others have the value zero, as in ``forward``.

        Args:
            indices: of any integer dtype; a topk axis after C.
            pool: "mean" or "sum" over codebooks; overrides the module's.
            mask: bool [B, *shape], as ``encode`` got it: where it is False the value is zero, without a gradient.
        Raises:
            TypeError: not integers, or a mask that is not bool. ValueError: shape or pool. IndexError: an index outside
            [0, K). RuntimeError: ``fully_shard`` has split the values together with a module around.
        Examples:
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).freeze_keys()
            >>> x = torch.randn(5, 4, 8)
            >>> torch.equal(bottleneck.decode(bottleneck.encode(x)), bottleneck(x))
            True
        """
        validation.integer("decode", "indices", indices)
        table = self._table()
        if fully_sharded.is_split(table):
            if fully_sharded.registered(self, "decode"):
                return self.decode(indices, pool, mask=mask)
            raise RuntimeError(fully_sharded.SPLIT.format(name="decode"))
        validation.codes(indices, table.shape[0])
        pool = self._pooled(pool)
        validation.same_device("indices", indices, "values", table)
        shape = indices.shape[2:]
        counted = None if mask is None else self._counted_codes(indices, mask)
        flat = indices.reshape(*indices.shape[:2], math.prod(shape)).transpose(1, 2)
        usable = self._search_mask()
        if self.topk > 1 and usable is not None and self._fewest < self.topk:
            out = self._decode_usable(flat, usable, counted)
            out = out if pool == "none" else getattr(out, pool)(1)
        else:
            out = self._gather(table, flat, pool, counted)
        return out.view(*(indices.shape if pool == "none" else (indices.shape[0], *shape)), out.shape[-1])

    def _pooled(self, pool: Pool | None) -> Pool:
        """What a call asks for, or else the module."""
        return self.pool if pool is None else validation.choice("pool", pool, functional.POOLS)

    def _counted_codes(self, indices: Tensor, mask: Tensor) -> Tensor:
        """The mask [B, *shape] of indices [B, C, (T), *shape], as [B, (T)*S]."""
        validation.tensor(type(self).__name__, "mask", mask)
        ranks = indices.shape[2] if self.topk > 1 and mask.dim() < indices.dim() - 1 else 1
        sizes = indices.shape[0], *indices.shape[2 + int(ranks > 1) :]
        positions.checked(type(self).__name__, mask, sizes, "indices", indices)
        return positions.per_rank(mask.reshape(mask.shape[0], math.prod(mask.shape[1:])), ranks)

    def _queries(self, x: Tensor, mask: Tensor | None = None, *, one_position: bool = False) -> Tensor:
        """x [B, C, *shape, D] as [B, S, C, D], without a copy for both seed layouts; NaN where ``mask`` is False.

        With ``one_position``, x [B, C, D] without a mask stays as it is.
        """
        owner, keys = type(self).__name__, dict.__getitem__(self.__dict__["_buffers"], "keys")
        validation.floating(owner, "x", x)
        validation.split_features(x, self.num_codebooks, keys.shape[2])
        validation.same_device("x", x, "keys", keys)
        if mask is not None:
            positions.checked(owner, mask, (x.shape[0], *x.shape[2:-1]), "x", x)
        if self.check_finite:
            validation.finite("x", x if mask is None else torch.where(mask[:, None, ..., None], x, 0))
        if x.dim() == 3:
            flat = x if one_position and mask is None else x.unsqueeze(1)
        else:
            flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1]).transpose(1, 2)
        if mask is not None:
            flat = positions.hidden(flat, mask.reshape(flat.shape[:2]))
        return flat if flat.stride(-1) == 1 else flat.contiguous()

    def _keys_for(self, queries: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        """The keys to search, and their packed form: the current ones, or in a recomputation those of before."""
        if not learns:
            return self._packed_keys()
        if torch.compiler.is_compiling():  # every run of the graph writes them
            return self.keys, torch.ops.kvb.pack_keys(self.keys)
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
            return torch.ops.kvb.sample(queries, keys, mask, self.sample_codebook_temperature, self._seed(), self.topk)
        return torch.ops.kvb.nearest(queries, keys, packed, mask, self.topk)

    def _seed(self) -> Tensor:
        """Of one draw of keys."""
        return torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")

    def _in_one_pass(self, pool: Pool, axes: int) -> bool:
        """Whether ``lookup`` gives the values as they are wanted: not with codebooks before more than one position."""
        nearest = self.topk == 1 and self.sample_codebook_temperature == 0 and self._fewest > 0
        return nearest and not (self.sparse_grad or self.shares_values) and (pool != "none" or axes == 0)

    def _present(self) -> Tensor | None:
        """Which ranks of a search find a usable pair, [C, T]; None where all do."""
        if self._usable is None or self._fewest >= self.topk:
            return None
        return torch.arange(self.topk, device=self._usable.device) < self._usable.sum(-1, keepdim=True)

    def _gather(
        self,
        table: Tensor,
        indices: Tensor,
        pool: Pool,
        counted: Tensor | None = None,
        sent: list[Tensor] | None = None,
    ) -> Tensor:
        """Rows of table [C, K, *] at indices [B, M, C], as [B, C, M, *], or pooled over C; zero where not counted."""
        if self._shares_values is not None and self.shares_values:
            group = self._shares_values.group
            sent = sent if sent is not None and collectives.same(group, self._processes()) else None
            fetched = ops.gather_together(table, indices, pool, "bcsv", self.sparse_grad, group, counted, sent)
        elif self.sparse_grad:
            fetched = ops.gather_row_grad(table, indices, pool, "bcsv", counted)
        else:
            fetched = ops.gather(table, indices, pool, "bcsv")
        return positions.cleared(fetched, counted, axis=2 if pool == "none" else 1)

    def _fetch_values(
        self,
        indices: Tensor,
        shape: torch.Size,
        pool: Pool,
        counted: Tensor | None,
        sent: list[Tensor] | None,
    ) -> Tensor:
        """Values at indices [B, S, C, T], as [B, C, (T), *shape, V], or pooled over C.

        Args:
            sent: the codes of all processes, where they know them already.
        """
        present = self._present()
        if present is None:
            return self._fetch(self._table(), indices, shape, pool, counted, sent)
        # The first rank in place of one that found nothing: no masked row is read, and none gets a gradient.
        some = torch.where(present, indices, indices[..., :1])
        fetched = self._fetch(self._table(), some, shape, "none", counted, sent)
        fetched = torch.where(self._unfold(present.expand_as(indices), shape)[..., None], fetched, 0)
        return fetched if pool == "none" else getattr(fetched, pool)(1)

    def _decode_usable(self, indices: Tensor, usable: Tensor, counted: Tensor | None) -> Tensor:
        """Values [B, C, M, V] at indices [B, M, C]; a masked pair stands for a rank that found none, as in a search."""
        present = torch.ops.kvb.gather(usable[..., None].float(), indices, "none", "bcsv") > 0
        some = usable.to(torch.uint8).argmax(-1)
        safe = torch.where(present[..., 0].transpose(1, 2), indices, some)
        return torch.where(present, self._gather(self._table(), safe, "none", counted), 0)

    def _fetch(
        self,
        table: Tensor,
        indices: Tensor,
        shape: Iterable[int],
        pool: Pool = "none",
        counted: Tensor | None = None,
        sent: list[Tensor] | None = None,
    ) -> Tensor:
        """Rows of table [C, K, *] at indices [B, S, C, T], as [B, C, (T), *shape, *], or pooled over C."""
        B, S, C, T = indices.shape
        flat = indices.permute(0, 3, 1, 2).reshape(B, T * S, C)
        fetched = self._gather(table, flat, pool, None if counted is None else positions.per_rank(counted, T), sent)
        books = (C,) if pool == "none" else ()
        return fetched.view(B, *books, *self._ranks(), *shape, table.shape[-1])

    def _unfold(self, found: Tensor, shape: Iterable[int]) -> Tensor:
        """[B, S, C, T] as contiguous [B, C, (T), *shape]."""
        B, _, C, _ = found.shape
        return found.permute(0, 2, 3, 1).reshape(B, C, *self._ranks(), *shape).contiguous()

    def _ranks(self) -> tuple[int, ...]:
        return (self.topk,) if self.topk > 1 else ()

    # --- whole data sets ----------------------------------------------------------------------------------------------

    def _target(self) -> KeyValueBottleneck:
        return self

    def _features(self, inputs: Any, mask: Tensor | None) -> Part:
        return Part(inputs, mask)

    def _heads(self, features: Any) -> Any:
        return features

    def _codes(self, inputs: Any, mask: Tensor | None, dtype: torch.dtype) -> Part:
        return Part(self.encode(inputs, mask=mask, dtype=dtype), mask)

    def extra_repr(self) -> str:
        table = getattr(self, "values", None)  # which users exchange, and may have deleted
        values = "no values" if table is None else f"values {table.shape[-1]}-d ({table.nbytes / 1e6:.4g} MB)"
        state = "frozen" if self.keys_frozen else "learning"
        return (
            f"{self.num_codebooks} codebooks x {self.key_value_pairs_per_codebook} pairs, "
            f"keys {self.dim_keys}-d {state}{'' if self._initialised else ' (not initialised)'}, "
            f"{values}, topk={self.topk}, backend={ops.backend(self._device.type)}"
        )
