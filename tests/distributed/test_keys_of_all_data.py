"""Keys from the data of all processes: loaders of unequal length, empty ones, one that fails, and calls alone."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import pytest
import scenarios
import torch
import torch.distributed as dist

import kvb
from kvb.modules import key_learning

METHODS = ("random", "sample", "kmeans", "kmeans++")
LOADERS = {"even": (12, 12), "unequal": (30, 3), "empty": (0, 24), "three": (5, 0, 40), "four": (1, 2, 3, 50)}


def rows(rank: int, n: int, spoiled: int = 0) -> torch.Tensor:
    x = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(rank))
    x[:spoiled, 0] = torch.nan
    return x


def made(method: str = "random", K: int = 6, **options) -> kvb.KeyValueBottleneck:
    return kvb.KeyValueBottleneck(2, K, 3, 2, init_mode=method, kmeans_iters=4, **options)


def _initialised(method, sizes, epochs, spoiled, K=6, options=None):
    own, x = made(method, K, **(options or {})), rows(dist.get_rank(), sizes[dist.get_rank()], spoiled)
    report = own.init_keys(x.split(4), epochs=epochs, progress=False)
    return scenarios.state(own), report


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOADERS)
def test_all_get_the_same_keys_of_all_data(processes, method, name):
    sizes = LOADERS[name]
    found = processes(len(sizes), _initialised, method, sizes, 2, 1)
    state = scenarios.same([state for state, _ in found])
    assert state["keys"].isfinite().all()
    reports = [report for _, report in found]
    assert set(reports) == {reports[0]}
    assert (reports[0].rows, reports[0].skipped) == (sum(sizes), sum(size > 0 for size in sizes))


@pytest.mark.parametrize("method", ["sample", "kmeans", "kmeans++"])
def test_as_many_keys_as_rows_are_the_rows(processes, method):
    """Every row of every process is then one key, whoever drew it."""
    state = scenarios.same([state for state, _ in processes(3, _initialised, method, (5, 0, 8), 0, 0, 13)])
    data = torch.cat([rows(0, 5), rows(2, 8)])
    for c in range(2):
        found, want = (sorted(map(tuple, part.tolist())) for part in (state["keys"][c], data[:, c]))
        assert torch.tensor(found).allclose(torch.tensor(want))


def _lloyd(sizes, seeds):
    with mock.patch.object(key_learning, "_seed", return_value=seeds):
        return _initialised("kmeans", sizes, 0, 1)


@pytest.mark.parametrize("sizes", [(40, 40), (70, 10), (0, 50, 30)])
def test_means_are_those_of_one_process(processes, monkeypatch, sizes):
    """From the same seeds: means of all rows, iteration by iteration."""
    seeds = torch.randn(2, 6, 3)
    found = processes(len(sizes), _lloyd, sizes, seeds)
    state = scenarios.same([state for state, _ in found])
    monkeypatch.setattr(key_learning, "_seed", lambda *others: seeds.clone())
    one = made("kmeans")
    report = one.init_keys(torch.cat([rows(r, n, 1) for r, n in enumerate(sizes)]), epochs=0, progress=False)
    torch.testing.assert_close(state["keys"], one.keys, rtol=1e-5, atol=1e-6)
    assert found[0][1]._replace(inertia=0) == report._replace(inertia=0)
    assert found[0][1].inertia == pytest.approx(report.inertia, rel=1e-6)


def test_epochs_are_those_of_one_process(processes):
    """Moving averages of the processes' first batches, then of their second ones, until the longest loader ends."""
    sizes = (10, 3, 6)
    found = processes(3, _averaged, sizes)
    one = made(decay=0.5)
    one.load_state_dict(_start(0))
    parts = [rows(r, n).split(4) for r, n in enumerate(sizes)]
    steps = [torch.cat([part[t] for part in parts if t < len(part)]) for t in range(3)]
    one.init_keys(steps, "random", epochs=2, progress=False)
    scenarios.close(scenarios.same(found), scenarios.state(one))


def _start(rank):
    torch.manual_seed(rank)
    return made().state_dict()


def _averaged(sizes):
    """Every process starts with keys of its own, and takes those of the first."""
    rank = dist.get_rank()
    own = made(decay=0.5)
    own.load_state_dict(_start(rank))
    own.init_keys(rows(rank, sizes[rank]).split(4), "random", epochs=2, progress=False)
    return scenarios.state(own)


def test_the_generator_of_the_first_process_decides(processes):
    first, second = processes(2, _reproduced)[0], processes(2, _reproduced)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)


def _reproduced():
    own = made("kmeans++")
    generator = torch.Generator().manual_seed(5 + dist.get_rank() * 7)
    own.init_keys(rows(dist.get_rank(), 40).split(7), generator=generator, progress=False)
    return scenarios.state(own)


def _first_batch(method, sizes, steps):
    own = made(method)
    for step in range(steps):
        own(rows(10 * step + dist.get_rank(), sizes[dist.get_rank()]) if step or sum(sizes) < 99 else rows(0, 0))
    return scenarios.state(own)


@pytest.mark.parametrize("method", ["sample", "kmeans", "kmeans++"])
@pytest.mark.parametrize("sizes", [(9, 4), (0, 12), (99, 1)])
def test_the_first_batches_of_all_initialise(processes, method, sizes):
    """(99, 1): the first batches of all are empty, and the second ones initialise."""
    state = scenarios.same(processes(2, _first_batch, method, sizes, 3))
    assert state["initted"] == 1
    assert state["keys"].isfinite().all()


def _prepared(sizes):
    torch.manual_seed(3)
    model = kvb.BottleneckedEncoder(torch.nn.Identity(), 6, 2, 6, 3, 2, "kmeans", splitting_mode="chunk")
    model.prepare(rows(dist.get_rank(), sizes[dist.get_rank()]).flatten(1).split(4), epochs=1, progress=False)
    return scenarios.state(model.bottleneck)


def test_an_encoder_is_prepared_by_all(processes):
    state = scenarios.same(processes(2, _prepared, (20, 3)))
    assert state["kvb_flags"][1] == 0


# --- what ends in an error --------------------------------------------------------------------------------------------


def _failing(method, epochs):
    def loader():
        yield rows(0, 4)
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        yield rows(0, 4)

    class Loader:
        def __iter__(self):
            return loader()

    own = made(method)
    before = scenarios.state(own)
    try:
        own.init_keys(Loader(), epochs=epochs, progress=False)
    except (RuntimeError, OSError) as error:
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in scenarios.state(own).items())
        return type(error).__name__, str(error), unchanged
    return "no error"


@pytest.mark.parametrize(("method", "epochs"), [("kmeans", 0), ("sample", 1), ("random", 1)])
def test_a_loader_that_fails_ends_all(processes, method, epochs):
    for rank, found in enumerate(processes(3, _failing, method, epochs)):
        assert found[2], "nothing has changed"
        if rank == 1:
            assert found[:2] == ("OSError", "the disk is gone")
        else:
            assert found[:2] == ("RuntimeError", "1 of 3 processes failed while they read their data: see there")


def _no_rows():
    try:
        made("kmeans").init_keys([rows(0, 0)], progress=False)
    except ValueError as error:
        return str(error)
    return "no error"


def test_no_rows_in_any_process(processes):
    assert processes(2, _no_rows) == ["data yielded no rows"] * 2


def _alone(sync):
    own = made("kmeans")
    if dist.get_rank() == 0:
        group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
        own.process_group = group
        try:
            own.init_keys(rows(0, 20), sync=sync, progress=False)
        except RuntimeError as error:
            return str(error)
    else:
        dist.new_group([0, 1], timeout=timedelta(seconds=2))
    return own.keys_initialised


def test_one_that_calls_alone_is_told_so(processes):
    message, other = processes(2, _alone, True)
    assert message.startswith("init_keys waited for the 2 processes of its group, and not all of them called it")
    assert "sync=False" in message
    assert other is False


def test_one_may_call_alone(processes):
    assert processes(2, _alone, False) == [True, False]
