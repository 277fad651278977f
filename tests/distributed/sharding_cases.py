"""Tables to split, and what one process gives for them. Small integers: distances are exact, and most of them tie."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import kvb
from kvb.distributed import parallelize


class Case(NamedTuple):
    """One table, its queries, and options of the module."""

    C: int
    K: int
    D: int
    V: int
    B: int
    shape: tuple[int, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})
    mask: str = ""  # "some" pairs, "first" half of them, "none" at all in the first codebook
    broken: bool = False  # NaN and Inf among queries and keys
    dtype: torch.dtype = torch.float32


CASES = [
    Case(4, 16, 3, 5, 9),
    Case(7, 12, 2, 3, 7),
    Case(7, 10, 4, 2, 6, (3,)),
    Case(4, 8, 1, 1, 30),
    Case(8, 33, 5, 8, 4, (2, 3)),
    Case(4, 64, 2, 4, 50),
    Case(11, 7, 3, 3, 5),
    Case(4, 11, 2, 3, 0),
    Case(4, 11, 2, 3, 1),
    Case(10, 10, 3, 2, 8, options={"topk": 3}),
    Case(4, 10, 2, 4, 12, (2,), options={"topk": 4}),
    Case(4, 7, 2, 3, 6, options={"topk": 7}),
    Case(4, 16, 3, 5, 9, mask="some"),
    Case(7, 13, 2, 3, 9, mask="first"),
    Case(4, 12, 2, 3, 8, mask="none"),
    Case(4, 12, 2, 3, 8, options={"topk": 3}, mask="few"),
    Case(4, 16, 3, 5, 20, broken=True),
    Case(4, 16, 3, 5, 20, options={"topk": 2}, broken=True, mask="some"),
    Case(4, 40, 3, 5, 20, dtype=torch.float64),
    Case(4, 16, 3, 5, 9, dtype=torch.bfloat16),
    Case(8, 130, 14, 10, 16),
    Case(4, 257, 8, 6, 64, options={"sparse_grad": True}),
]
GIANT = [case._replace(C=C) for case, C in zip(CASES, cycle((1, 2, 1, 1, 3)))]  # few codebooks, to split over pairs


def mesh(*sizes: int):
    """Over all processes: (data, table), or (table,)."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("data", "table")[-len(sizes) :])


def module(case: Case, seed: int = 1) -> kvb.KeyValueBottleneck:
    generator = torch.Generator().manual_seed(seed)
    made = kvb.KeyValueBottleneck(case.C, case.K, case.D, case.V, **{"return_values_only": False, **case.options})
    made.reset_parameters(generator)
    keys = (made.keys * 1.3).round().clamp(-2, 2)
    if case.broken:
        keys[:, 1::5, 0], keys[:, 2::7, -1] = torch.nan, torch.inf
    made.keys, made.keys_avg = keys, keys.nan_to_num(0, 0, 0)
    if case.dtype == torch.float64:
        made.double()
    else:
        made.values.data = made.values.data.to(case.dtype)
    allowed = torch.ones(case.C, case.K, dtype=torch.bool)
    if case.mask == "some":
        allowed = torch.rand(case.C, case.K, generator=generator) > 0.5
        allowed[:, -1] = True
    elif case.mask == "first":
        allowed[:, : case.K // 2] = False
    elif case.mask == "none":
        allowed[0] = False
    elif case.mask == "few":
        allowed[:, 2:] = False
    return made.mask_pairs(allowed) if case.mask else made


def queries(case: Case, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(case.B, case.C, *case.shape, case.D, generator=generator) * 1.5).round().clamp(-3, 3)
    if case.broken:
        x[::4, 0, ..., 0], x[1::5, -1, ..., -1] = torch.nan, -torch.inf
    return x.double() if case.dtype == torch.float64 else x


def pair(case: Case, sizes: tuple[int, ...], **split: str) -> tuple[kvb.KeyValueBottleneck, kvb.KeyValueBottleneck]:
    """The module in one process, and split."""
    alone = module(case)
    alone.process_group = False
    there = module(case, seed=1 if dist.get_rank() == 0 else 5)  # the table of the first process counts
    return alone, parallelize(there, mesh(*sizes), **split)


def near(found: Tensor, wanted: Tensor, what: str, *, scale: float = 1.0) -> None:
    """Equal up to the rounding of a few sums, NaN where NaN is wanted."""
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{what}: {found.dtype} instead of {wanted.dtype}"
    unit = torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(
        found, wanted, rtol=8 * unit, atol=8 * unit * scale, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def whole(tensor: Tensor) -> Tensor:
    """A DTensor, joined."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_state(split: kvb.KeyValueBottleneck, alone: kvb.KeyValueBottleneck, what: str) -> None:
    wanted = alone.state_dict()
    for name, found in split.state_dict().items():
        if wanted[name].is_floating_point():
            near(whole(found), wanted[name], f"{what}: {name}", scale=float(wanted[name].nan_to_num().abs().max()))
        else:
            assert torch.equal(whole(found), wanted[name]), f"{what}: {name}"
