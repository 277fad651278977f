"""Hostile calls of operators, and what becomes of them; run as a script, in a process that may die.

    python hostile.py FIRST COUNT JOURNAL

Every call has a number, from which all of it follows. Its number goes to the journal before the call is made, so that
a signal can be put down to it. Calls that end otherwise than those of the reference are printed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from packed_damage import damaged

from kvb import reference

FLOATS = [torch.float32] * 5 + [torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.int64] * 4 + [torch.int32, torch.int16, torch.int8, torch.uint8]
STRANGE = [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int32, torch.float32, torch.uint16]
RTOL = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 2e-5, torch.float64: 1e-11}


class Call:
    """One call, drawn from a number: ``tensors`` by name, and what follows them."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        # A call is bent in one way, or two, or not at all: most errors hide all others.
        self.bends = self.random.choices([0, 1, 2], [3, 5, 2])[0]
        self.checks_packed = True
        self.B, self.S, self.C, self.K, self.D, self.V = (self.size() for _ in range(6))
        self.float, self.integer = self.random.choice(FLOATS), self.random.choice(INTEGERS)
        self.operator = self.random.choice(sorted(OPERATORS))
        self.tensors, self.options = OPERATORS[self.operator](self)
        bends = [self.bend_shape, self.bend_dtype, self.bend_alias, self.bend_device, self.bend_storage]
        # An emptied storage last: PyTorch's own functions do not survive it.
        for bend in sorted(self.random.choices(range(5), k=self.bends)):
            bends[bend]()

    def size(self) -> int:
        return 0 if self.random.random() < 0.06 else self.random.choice([1, 1, 2, 3, 5, 8, 16, 17, 40])

    def odd(self, usual: Any, *others: Any) -> Any:
        """Mostly the usual; one of the others where the call is bent."""
        return self.random.choice(others) if self.bends and self.random.random() < 0.15 else usual

    # --- tensors ------------------------------------------------------------------------------------------------------

    def strided(self, *sizes: int) -> torch.Tensor:
        """float64 numbers with one of many strides."""
        kind = self.random.choice(["plain"] * 4 + ["transposed", "steps", "expanded", "offset"])
        normal = lambda *shape: torch.randn(shape, generator=self.generator, dtype=torch.float64)  # noqa: E731
        if kind == "transposed" and len(sizes) > 1:
            order = self.random.sample(range(len(sizes)), len(sizes))
            return normal(*(sizes[i] for i in order)).permute([order.index(i) for i in range(len(sizes))])
        if kind == "steps":
            return normal(*sizes[:-1], 2 * sizes[-1])[..., ::2]
        if kind == "expanded":
            axis = self.random.randrange(len(sizes))
            return normal(*sizes[:axis], 1, *sizes[axis + 1 :]).expand(sizes)
        return normal(sum(sizes), *sizes)[-1] if kind == "offset" and sum(sizes) else normal(*sizes)

    def floats(self, *sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        numbers = self.strided(*sizes)
        kind = self.random.choice(["normal"] * 4 + ["whole", "broken", "large", "small", "zero"])
        if kind == "whole":
            numbers = numbers.round()
        elif kind == "broken":
            place = torch.rand(sizes, generator=self.generator) < 0.1
            numbers = torch.where(place, self.random.choice([float("nan"), float("inf"), -float("inf")]), numbers)
        elif kind != "normal":
            numbers = numbers * {"large": 1e3, "small": 1e-4, "zero": 0.0}[kind]
        return self.as_dtype(numbers, dtype or self.float)

    def as_dtype(self, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same strides in another dtype."""
        span = 1 + sum((n - 1) * step for n, step in zip(numbers.shape, numbers.stride(), strict=True))
        if numbers.numel() == 0 or dtype == numbers.dtype:
            return numbers.to(dtype)
        offset = numbers.storage_offset()
        flat = torch.as_strided(numbers, (offset + span,), (1,), 0).to(dtype)
        return torch.as_strided(flat, numbers.shape, numbers.stride(), offset)

    def codes(self, *sizes: int, limit: int) -> torch.Tensor:
        limit = min(limit, torch.iinfo(self.integer).max + 1)
        codes = (self.strided(*sizes).abs() * 1e6).floor() % max(1, limit)
        if self.bends and self.random.random() < 0.1 and codes.numel():
            codes = torch.where(codes == codes.flatten()[-1], self.random.choice([-1, limit, 1 << 20]), codes)
        return self.as_dtype(codes, self.integer)

    def mask(self) -> torch.Tensor | None:
        share = self.random.choice([0.0, 0.5, 1.0])
        return self.random.choice([None, self.strided(self.C, self.K).abs() >= share])

    # --- bends --------------------------------------------------------------------------------------------------------

    def pick(self) -> str:
        return self.random.choice([name for name, tensor in self.tensors.items() if tensor is not None])

    def bend_shape(self) -> None:
        name = self.pick()
        tensor = self.tensors[name]
        bends: list[Callable[[], torch.Tensor]] = [lambda: tensor[None], lambda: tensor.flatten(), lambda: tensor.mT]
        if tensor.dim() > 1:
            bends += [
                lambda: tensor.select(0, 0),
                lambda: tensor.narrow(-1, 0, tensor.shape[-1] // 2),
                lambda: tensor[:0],
            ]
        if tensor.dim() and tensor.dtype != torch.float8_e4m3fn:
            bends.append(lambda: torch.cat([tensor, tensor], -1))
        try:
            self.tensors[name] = self.random.choice(bends)()
        except (IndexError, RuntimeError):
            return

    def bend_dtype(self) -> None:
        name = self.pick()
        self.tensors[name] = self.tensors[name].to(self.random.choice(STRANGE + INTEGERS + FLOATS))

    def bend_storage(self) -> None:
        storage = self.tensors[self.pick()].untyped_storage()
        storage.resize_(self.random.choice([0, storage.nbytes() // 2]))

    def bend_alias(self) -> None:
        name, other = self.pick(), self.pick()
        source, target = self.tensors[other], self.tensors[name]
        held = source.untyped_storage().nbytes() - source.storage_offset() * source.element_size()
        needed = target.numel() * target.element_size()
        if name == other or held < needed or source.device != target.device:
            return
        offset = source.storage_offset() * source.element_size()
        if offset % max(1, target.element_size()) == 0:
            shared = torch.empty(0, dtype=target.dtype).set_(
                source.untyped_storage(), offset // target.element_size(), target.shape, target.contiguous().stride()
            )
            self.tensors[name] = shared if target.dtype.is_floating_point else shared.zero_()

    def bend_device(self) -> None:
        name = self.pick()
        self.tensors[name] = self.tensors[name].to("meta")

    # --- the call -----------------------------------------------------------------------------------------------------

    def make(self, op: Any) -> tuple[torch.Tensor, ...]:
        """What the operator returns and what is in its tensors afterwards."""
        out = getattr(op, self.operator)(*self.tensors.values(), *self.options)
        outs = out if isinstance(out, tuple) else (out,)
        written = {"update_keys_": 3, "sgd_step_": 1, "tally_": 1, "clip_rows_": 1, "move_rows_": 1}.get(
            self.operator, 0
        )
        if self.operator in ("update_keys_", "pack_keys", "move_rows_"):
            outs = ()  # packed keys are each backend's own
        return (*outs, *list(self.tensors.values())[:written])

    def packed(self, op: Any, keys: torch.Tensor) -> torch.Tensor:
        """Made by the backend that will read it: sometimes of other keys, or damaged."""
        try:
            packed = op.pack_keys(keys)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return torch.zeros(self.C, 64, dtype=torch.uint8)
        if not self.bends or packed.is_meta or self.random.random() < 0.6:
            return packed
        self.checks_packed = False
        others = [lambda: op.pack_keys(keys.flip(0)), lambda: op.pack_keys(keys + 1), lambda: packed[:, :-1]]
        return self.random.choice([*others, *[lambda: list(damaged(packed, 12))[self.random.randrange(12)]] * 6])()


def _search(call: Call) -> dict[str, Any]:
    keys = call.floats(call.C, call.K, call.D)
    dtype = call.odd(call.float, torch.float64, torch.float16)
    return {"queries": call.floats(call.B, call.S, call.C, call.D, dtype=dtype), "keys": keys, "packed": None}


def _pool(call: Call) -> str:
    return call.odd(call.random.choice(["none", "mean", "sum"]), "max", "")


def _count(call: Call) -> int:
    return call.odd(call.K, 0, -1, call.K + 1, 1 << 40, 1 << 62)


def _nearest(call: Call) -> Any:
    return {**_search(call), "mask": call.mask()}, (call.odd(call.random.choice([1, 1, 2, 5]), 0, -1, call.K, 1 << 40),)


def _lookup(call: Call) -> Any:
    return {**_search(call), "values": call.floats(call.C, call.K, call.V), "mask": call.mask()}, (_pool(call),)


def _gather(call: Call) -> Any:
    codes = call.codes(call.B, call.S, call.C, limit=call.K)
    layout = call.odd(call.random.choice(["bscv", "bcsv", "bv"]), "bsc", "")
    return {"values": call.floats(call.C, call.K, call.V), "indices": codes}, (_pool(call), layout)


def _gradient(call: Call) -> Any:
    pool = _pool(call)
    sizes = (call.B, call.S, call.C, call.V) if pool == "none" else (call.B, call.S, call.V)
    codes = call.codes(call.B, call.S, call.C, limit=call.K)
    return {"grad": call.floats(*sizes), "indices": codes}, (_count(call), pool)


def _statistics(call: Call) -> Any:
    codes = call.codes(call.B, call.S, call.C, limit=call.K)
    return {"queries": call.floats(call.B, call.S, call.C, call.D), "indices": codes}, (_count(call),)


def _sgd(call: Call) -> Any:
    values = call.floats(call.C, call.K, call.V)
    codes = call.codes(call.B, call.S, call.C, limit=call.K)
    call.integer = torch.int64
    targets = call.codes(call.B, limit=call.V)
    return {"values": values.contiguous(), "indices": codes, "targets": targets}, (0.1, call.odd(1.0, 1e9), 0.1)


def _tally(call: Call) -> Any:
    kind = call.random.choice([torch.int32, torch.int64, torch.float32, torch.float64])
    codes = call.codes(call.B, call.S, call.C, limit=call.K)
    weights = None if call.random.random() < 0.5 else call.as_dtype(call.strided(call.B, call.S, call.C).round(), kind)
    call.integer = torch.int64
    targets, counts = call.codes(call.B, limit=call.V), call.strided(call.C, call.K, call.V).round()
    tensors = {"counts": counts.to(kind).contiguous(), "indices": codes, "targets": targets, "weights": weights}
    return tensors, (call.random.random() < 0.5,)


def _move(call: Call) -> Any:
    values, places = call.floats(call.C, call.K, call.V).contiguous(), _some_places(call)
    return {"values": values, "places": places, "grads": call.floats(places.shape[1], call.V, dtype=values.dtype)}, (
        0.1,
    )


def _clip(call: Call) -> Any:
    places = _some_places(call)
    max_norm = call.random.choice([0.0, 0.5, 1e30, float("nan")])
    return {"grads": call.floats(places.shape[1], call.V).contiguous(), "places": places}, (max_norm,)


def _some_places(call: Call) -> torch.Tensor:
    """Mostly in order."""
    call.integer = torch.int64
    if call.random.random() < 0.7:
        return (torch.rand(call.C, call.K, generator=call.generator) < 0.5).nonzero().t()
    return call.codes(2, call.B, limit=call.K)


def _rows(call: Call) -> Any:
    call.integer = torch.int64
    return {"rows": call.codes(call.B, limit=call.C * call.K)}, (_count(call),)


def _places(call: Call) -> Any:
    call.integer = torch.int64
    return {"places": call.codes(2, call.B, limit=call.K)}, (_count(call),)


def _update(call: Call) -> Any:
    sizes = call.C, call.K, call.D
    exact = torch.float64 if call.float == torch.float64 else torch.float32
    tensors = {
        "keys": call.floats(*sizes).contiguous(),
        "keys_avg": call.floats(*sizes).contiguous(),
        "cluster_size": call.floats(*sizes[:2]).abs().contiguous(),
        "hits": call.floats(*sizes[:2], dtype=exact).abs().round().contiguous(),
        "sums": call.floats(*sizes, dtype=exact).contiguous(),
        "spare": None,
        "usable": None,
    }
    if call.random.random() < 0.5:
        R = max(1, call.size())
        call.integer = torch.int64
        tensors["spare"] = call.floats(call.C, R, call.D).contiguous()
        tensors["usable"] = call.codes(call.C, limit=R + 1).contiguous()
    return tensors, (call.random.choice([0.0, 0.5, 1.0]), 1e-5, 0.5, 1.0, call.random.random() < 0.5)


OPERATORS: dict[str, Callable[[Call], Any]] = {
    "pack_keys": lambda call: ({"keys": call.floats(call.C, call.K, call.D)}, ()),
    "nearest": _nearest,
    "lookup": _lookup,
    "gather": _gather,
    "gather_backward": _gradient,
    "gather_backward_rows": _gradient,
    "accumulate": _statistics,
    "count": _statistics,
    "sgd_step_": _sgd,
    "rows_to_places": _rows,
    "places_to_rows": _places,
    "clip_rows_": _clip,
    "move_rows_": _move,
    "tally_": _tally,
    "update_keys_": _update,
}


def outcome(number: int, op: Any) -> tuple[Call, tuple[torch.Tensor, ...] | None, str]:
    """The call, what came of it, or the error."""
    call = Call(number)
    if "packed" in call.tensors and call.tensors["packed"] is None:
        call.tensors["packed"] = call.packed(op, call.tensors["keys"])
    order = ("queries", "keys", "packed", "values", "mask") if call.operator == "lookup" else tuple(call.tensors)
    call.tensors = {name: call.tensors[name] for name in order}
    try:
        return call, call.make(op), ""
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
        return call, None, f"{type(error).__name__}: {error}"


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype or got.device != want.device:
        return False
    if got.is_meta or not got.is_floating_point():
        return got.is_meta or torch.equal(got, want)
    rtol, finite = RTOL[got.dtype], torch.where(want.isfinite(), want, 0).double()
    atol = rtol * float(finite.abs().max()) if want.numel() else 0.0
    return torch.allclose(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


def difference(number: int) -> str:
    """How the fast backend's answer differs from the reference's; empty where it does not."""
    call, got, error = outcome(number, torch.ops.kvb)
    if "/" in error:
        return f"a path in the message: {error}"
    if all(tensor is None or tensor.is_meta for tensor in call.tensors.values()):
        return ""  # shapes alone, which nothing checks
    if not call.checks_packed:  # an error, or indices of keys
        indices = got[-1 if call.operator == "lookup" else 0] if got else torch.zeros(0)
        return "" if not got or not indices.numel() or (indices.min() >= 0 and indices.max() < call.K) else "an index"
    _, want, refused = outcome(number, reference)
    if want is None and "allocate memory" in refused:
        return ""  # a fast operator may need less of it
    if (got is None) != (want is None):
        return f"got {error or 'an answer'}, expected {refused or 'an answer'}"
    if got is None or want is None:
        return ""
    return "" if all(map(close, got, want)) else f"other numbers: {got} and {want}"


def main(first: int, count: int, journal: str) -> None:
    torch.set_num_threads(1)
    with open(journal, "w", buffering=1) as file:
        for number in range(first, first + count):
            print(number, file=file)
            found = difference(number)
            if found:
                print(number, Call(number).operator, found.replace("\n", " ")[:600], flush=True)
        print("done", file=file)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
