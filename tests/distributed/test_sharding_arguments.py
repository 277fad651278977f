"""What cannot be split, and operators on DTensor."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from sharding_cases import mesh
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kvb
from kvb.distributed import parallelize
from kvb.training import sgd_step


def _table(**options):
    return kvb.KeyValueBottleneck(4, 8, 2, 3, **options)


def _refused():
    here = mesh(2)
    for error, text, call in (
        (TypeError, "'module' must be torch.nn.Module, not list", lambda: parallelize([], here, codebooks="table")),
        (TypeError, "'mesh' must be DeviceMesh, not int", lambda: parallelize(_table(), 2, codebooks="table")),
        (ValueError, "holds no KeyValueBottleneck", lambda: parallelize(nn.Linear(2, 2), here, codebooks="table")),
        (ValueError, "give the name of a dimension", lambda: parallelize(_table(), here)),
        (ValueError, "pairs='data' is no dimension", lambda: parallelize(_table(), here, pairs="data")),
        (
            ValueError,
            "either codebooks or pairs",
            lambda: parallelize(_table(), here, codebooks="table", pairs="table"),
        ),
        (ValueError, "a dimension of its own", lambda: parallelize(_table(), here, codebooks="table", data="table")),
        (
            ValueError,
            "no dimension of the mesh, whose dimensions are ()",
            lambda: parallelize(_table(), init_device_mesh("cpu", (2,)), pairs="table"),
        ),
        (
            NotImplementedError,
            "sample_codebook_temperature = 0.5",
            lambda: parallelize(_table(sample_codebook_temperature=0.5), here, pairs="table"),
        ),
        (
            NotImplementedError,
            "threshold_ema_dead_code = 0.1",
            lambda: parallelize(_table(threshold_ema_dead_code=0.1), here, pairs="table"),
        ),
        (
            ValueError,
            "1 codebooks in 2 processes: with 1 in each, 1 would have none",
            lambda: parallelize(kvb.KeyValueBottleneck(1, 8, 2, 3), here, codebooks="table"),
        ),
    ):
        with pytest.raises(error, match=text.replace("(", r"\(").replace(")", r"\)")):
            call()
    model = nn.ModuleList([_table(), _table(threshold_ema_dead_code=0.1)])
    with pytest.raises(NotImplementedError):
        parallelize(model, here, pairs="table")
    assert type(model[0]) is kvb.KeyValueBottleneck  # all or nothing
    there = parallelize(_table(), here, pairs="table")
    assert "pairs " in repr(there)
    with pytest.raises(ValueError, match="split already"):
        parallelize(there, here, pairs="table")
    with pytest.raises(NotImplementedError, match="needs all pairs of a codebook in one process"):
        there.init_keys(torch.randn(9, 4, 2), "kmeans", progress=False)
    for split in ("codebooks", "pairs"):  # every process raises: none is left waiting
        there = parallelize(_table(), here, **{split: "table"}).eval()
        with pytest.raises(IndexError, match="index 8 is out of bounds for codebook with 8 pairs"):
            there.decode(torch.tensor([[0, 0, 0, 8]]))
        with pytest.raises(IndexError, match="index 8 is out of bounds"):
            sgd_step(there.values, torch.tensor([[0, 0, 0, 8]]), torch.tensor([0]))
        with pytest.raises(ValueError, match="expected x of shape"):
            there(torch.randn(3, 2, 2))
        with pytest.raises(RuntimeError, match="no pair was counted yet"):
            there.deactivate_counts()
        assert there(torch.randn(3, 4, 2)).shape == (3, 4, 3)
    with pytest.raises(ValueError, match="expected values split over codebooks"):
        sgd_step(distribute_tensor(torch.zeros(2, 2, 2), here, [Shard(2)]), torch.zeros(1, 2).long(), torch.tensor([0]))


def test_what_cannot_be_split_is_refused(processes):
    processes(2, _refused)


def _same(found, wanted, placement):
    assert isinstance(found, DTensor)
    assert found.placements == (placement,), found.placements
    torch.testing.assert_close(found.full_tensor(), wanted)


def _operators():
    here = mesh(2)

    def part(tensor, axis=None):
        return distribute_tensor(tensor, here, [Replicate() if axis is None else Shard(axis)])

    ops = torch.ops.kvb
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(*shape, generator=generator) for shape in ((6, 3, 5, 4), (5, 7, 4)))
    values = torch.randn(5, 7, 2, generator=generator)
    codes, distances = ops.nearest(queries, keys, ops.pack_keys(keys), None, 2)
    split = part(keys, 0)
    packed = ops.pack_keys(split)
    found = ops.nearest(part(queries, 2), split, packed, None, 2)
    _same(found[0], codes, Shard(2))
    _same(found[1], distances, Shard(2))
    first, table = codes[..., 0].contiguous(), part(values, 0).requires_grad_()
    for pool, placement in (("none", Shard(2)), ("sum", Partial())):
        fetched = ops.gather(table, part(first, 2), pool, "bscv")
        _same(fetched, ops.gather(values, first, pool, "bscv"), placement)
        whole = values.clone().requires_grad_()
        ops.gather(whole, first, pool, "bscv").square().sum().backward()
        fetched.full_tensor().square().sum().backward()
        _same(table.grad, whole.grad, Shard(0))
        table.grad = None
    wanted = ops.lookup(queries, keys, ops.pack_keys(keys), values, None, "mean")
    found = ops.lookup(part(queries, 0), part(keys), ops.pack_keys(part(keys)), part(values), None, "mean")
    for one, other in zip(found, wanted, strict=True):
        _same(one, other, Shard(0))
    found = ops.lookup(part(queries[:, 0], 0), part(keys), ops.pack_keys(part(keys)), part(values), None, "mean")
    for one, other in zip(found, wanted, strict=True):
        _same(one, other[:, 0], Shard(0))
    _same(ops.gather(table, part(first, 2), "mean", "bscv"), wanted[0], Replicate())  # joined first
    for found, wanted in zip(
        ops.accumulate(part(queries, 0), part(first, 0), 7), ops.accumulate(queries, first, 7), strict=True
    ):
        _same(found, wanted, Partial())
    with pytest.raises(NotImplementedError, match="does not have a sharding strategy registered"):
        ops.sample(part(queries, 2), split, None, 1.0, torch.tensor(3), 1)


def test_operators_on_dtensor(processes):
    processes(2, _operators)


def _alone_in_a_mesh():
    """One process is a mesh, too."""
    there = parallelize(_table(), mesh(1), codebooks="table")
    plain = _table()
    plain.load_state_dict({name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in there.state_dict().items()})
    x = torch.randn(5, 4, 2)
    assert torch.equal(there(x, pool="mean"), plain(x, pool="mean"))
    assert dist.get_world_size() == 1


def test_one_process(processes):
    processes(1, _alone_in_a_mesh)
