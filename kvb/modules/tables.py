"""What the tables of a bottleneck hold by decision: a new start, keys that are given, and more rows."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from kvb import collectives, validation
from kvb.checkpoints import MASK
from kvb.modules import fully_sharded
from kvb.modules.modes import Modes

ValuesStart = Literal["random", "zeros"]
VALUES_STARTS: tuple[ValuesStart, ...] = get_args(ValuesStart)
_CODEBOOKS, _PAIRS, _VALUES = 0, 1, 2  # the axes of values [C, K, V]
_Self = TypeVar("_Self", bound="Tables")


def start_(values: Tensor, how: ValuesStart, generator: torch.Generator | None = None) -> Tensor:
    """Fill a table in place, as ``init_values`` says."""
    return values.zero_() if how == "zeros" else fully_sharded.draw(values, generator)


class Tables(Modes):
    """The part of a ``KeyValueBottleneck`` that fills and grows its tables."""

    values: nn.Parameter
    init_values: ValuesStart = "random"  # also of a module pickled before there was a choice
    _processes: Any

    # --- filling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start again, in place, as a new module does: also what ``to_empty`` gave memory to after the meta device.

        Where ``fully_shard`` has split the values every process calls it, and all get the same keys.
        """
        if fully_sharded.is_split(self._table()):
            seed = collectives.shared_seed(self._processes(), generator, self._device)
            generator = torch.Generator(self._device).manual_seed(seed)
        keys, random = self._taken_quietly("keys"), self.init_mode == "random"
        start_(self._table(), self.init_values, generator)
        keys.normal_(generator=generator) if random else keys.zero_()
        starts = {"keys_avg": keys, "cluster_size": torch.ones(()), "cluster_size_counter": torch.zeros(())}
        for name, start in {**starts, "initted": torch.tensor(float(random)), MASK: torch.ones(())}.items():
            self._write(name, start)
        self._set_flags(learning=True, counting=True)
        self._packed.forget()

    @torch.no_grad()
    def set_keys(self: _Self, keys: Tensor) -> _Self:
        """Take these keys [C, K, D], of a clustering made elsewhere say; returns self.

        Equivalent to ``module.keys.copy_(keys)``, with statistics that start at them (``cluster_size`` 1). The keys
        are initialised then, and learn on until ``freeze_keys()``. Values, counts and mask do not change.

        Args:
            keys: floating-point, on any device, copied in the dtype of the module's keys.
        Raises:
            TypeError: not a dense floating-point tensor. ValueError: another shape; NaN or Inf. RuntimeError: the keys
            are frozen.
        Examples:
            >>> keys = torch.randn(4, 16, 8)
            >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).set_keys(keys)
            >>> bottleneck.freeze_keys().encode(keys.transpose(0, 1))[:3, 0]  # each key is nearest to itself
            tensor([0, 1, 2])
        """
        own = self._taken_quietly("keys")
        sizes = self.num_codebooks, self.key_value_pairs_per_codebook, self.dim_keys
        given = self._given_keys("set_keys", keys, sizes)
        if self.keys_frozen:
            raise RuntimeError("keys are frozen: call unfreeze_keys() before set_keys(...)")
        here = self._part(given).to(own.device)
        self._commit(here, here, torch.ones((), device="cpu"))
        return self

    def _given_keys(self, owner: str, keys: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        """In the dtype of the module's keys, where they fit."""
        validation.floating(owner, "keys", keys)
        validation.shape("keys", keys, "C K D", sizes)
        given = keys.detach().to(self._taken_quietly("keys").dtype)
        if not given.is_meta:
            validation.finite("keys", given)
        return given

    # --- growing ------------------------------------------------------------------------------------------------------

    def expand_values(self: _Self, V: int, *, generator: torch.Generator | None = None) -> _Self:
        """Make every value V numbers long, for new classes say; returns self.

        Equivalent to ``values = cat([values, new], -1)``: codes stay the same, and so do the first numbers of all
        values, bit for bit. The new ones start as ``init_values`` says.

        ``values`` becomes another parameter, without a gradient: ``kvb.optim.grow`` brings an optimizer along. Grow
        before ``DistributedDataParallel`` and ``kvb.distributed.sync_values``, which send the first process's tables.

        Args:
            V: the new ``dim_values``; the present one changes nothing.
            generator: draws random values.
        Raises:
            TypeError, ValueError: no positive integer, or less than now. NotImplementedError: split tables.
        Examples:
            >>> kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).expand_values(12).values.shape
            torch.Size([4, 16, 12])
        """
        added = self._added("expand_values", "V", V, _VALUES)
        if added:
            self._grow_values(_VALUES, added, generator)
        return self

    def expand_pairs(
        self: _Self, K: int, keys: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> _Self:
        """Give every codebook K pairs; returns self.

        Equivalent to ``cat([table, new], 1)`` for keys, values and all that belongs to them: the old pairs keep their
        indices, keys and values bit for bit, so that ``decode`` of old codes is as before. A query fetches a new pair
        only where that is nearer than all old ones. New pairs are not masked, and were never counted.

        Args:
            K: the new ``key_value_pairs_per_codebook``; the present one changes nothing.
            keys: of the new pairs, [C, K - old K, D]: queries that no key is near to, say. By default drawn from a
                normal distribution with mean and variance of the codebook's keys; zeros while keys wait for data.
            generator: draws keys and random values.
        Raises:
            as ``expand_values``; TypeError, ValueError: keys of another shape, not floating-point, or with NaN or Inf.
        Examples:
            >>> kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).expand_pairs(20).values.shape
            torch.Size([4, 20, 10])
        """
        added = self._added("expand_pairs", "K", K, _PAIRS)
        return self._grow(_PAIRS, added, "expand_pairs", keys, generator)

    def expand_codebooks(
        self: _Self, C: int, keys: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> _Self:
        """Have C codebooks; returns self. ``forward`` then takes x [B, C, *shape, D].

        Equivalent to ``cat([table, new], 0)`` for keys, values and all that belongs to them: the old codebooks stay as
        they are bit for bit. A mean over codebooks is then one over C.

        Args:
            C: the new ``num_codebooks``; the present one changes nothing.
            keys: of the new codebooks, [C - old C, K, D]. By default drawn from a normal distribution with mean and
                variance of all keys; zeros while keys wait for data.
            generator: draws keys and random values.
        Raises:
            as ``expand_pairs``.
        Examples:
            >>> kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).expand_codebooks(6).values.shape
            torch.Size([6, 16, 10])
        """
        added = self._added("expand_codebooks", "C", C, _CODEBOOKS)
        return self._grow(_CODEBOOKS, added, "expand_codebooks", keys, generator)

    def _added(self, owner: str, name: str, size: int, axis: int) -> int:
        """How much is new on an axis of the values."""
        if hasattr(self.values, "placements"):
            raise NotImplementedError(
                f"{owner}(...) needs whole tables, and these are split over processes: grow the module before "
                "parallelize(...) or fully_shard(...)"
            )
        validation.positive_int(name, size)
        now = self.values.shape[axis]
        if size < now:
            raise ValueError(f"{owner}(): tables only grow, expected {name} >= {now}, got {size}")
        return int(size - now)

    def _grow(
        self: _Self, axis: int, added: int, owner: str, keys: Tensor | None, generator: torch.Generator | None
    ) -> _Self:
        """Codebooks or pairs. Everything that may fail comes before the first write."""
        own = self._taken_quietly("keys")
        shape = [*own.shape]
        shape[axis] = added
        if keys is not None:
            keys = self._given_keys(owner, keys, (shape[0], shape[1], shape[2]))
        if not added:
            return self
        with torch.inference_mode(False), torch.no_grad():  # tensors created in inference mode cannot learn
            new = self._drawn_keys(axis, shape, generator) if keys is None else keys.to(own.device)
            starts = {
                "keys": new,
                "keys_avg": new,
                "cluster_size": own.new_ones(shape[:2]),
                "cluster_size_counter": own.new_zeros(shape[:2]),
                MASK: own.new_ones(shape[:2]),
            }
            former = {name: self._taken_quietly(name) for name in starts}
            grown = {name: torch.cat([former[name], start.to(former[name])], axis) for name, start in starts.items()}
        self._grow_values(axis, added, generator)
        for name, table in grown.items():
            setattr(self, name, table)
        self._packed.forget()
        self._look()
        return self

    def _drawn_keys(self, axis: int, shape: list[int], generator: torch.Generator | None) -> Tensor:
        """New keys that lie where the others do."""
        own = self._taken_quietly("keys")
        if not self.keys_initialised:
            return own.new_zeros(shape)
        axes = (_PAIRS,) if axis == _PAIRS else (_CODEBOOKS, _PAIRS)
        spread, mean = torch.std_mean(own, dim=axes, correction=0, keepdim=True)
        return mean + spread * own.new_empty(shape).normal_(generator=generator)

    def _grow_values(self, axis: int, added: int, generator: torch.Generator | None) -> None:
        old = self.values
        shape = [*old.shape]
        shape[axis] = added
        with torch.inference_mode(False), torch.no_grad():
            new = start_(old.new_empty(shape), self.init_values, generator)
            table = torch.cat([old.detach(), new], axis)
        self.values = nn.Parameter(table, requires_grad=old.requires_grad)
