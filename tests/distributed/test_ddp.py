"""In ``DistributedDataParallel``: with its defaults, a group of its own, ``join``, and processes that do not agree."""

from __future__ import annotations

from datetime import timedelta

import pytest
import scenarios
import torch
import torch.distributed as dist
from scenarios import C, D, K, Scenario, V
from torch.nn.parallel import DistributedDataParallel as DDP

import kvb
import kvb.distributed

DEAD = {"threshold_ema_dead_code": 0.9}


class Model(torch.nn.Module):
    """A bottleneck between layers that learn as usual."""

    def __init__(self, bottleneck: kvb.KeyValueBottleneck) -> None:
        super().__init__()
        self.bottleneck, self.head = bottleneck, torch.nn.Linear(V, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bottleneck(x, pool="mean"))


def _ddp(scenario, options, group_of=None):
    rank = dist.get_rank()
    group = None if group_of is None else dist.new_group(list(group_of))
    if group_of is not None and rank not in group_of:
        return None
    own = scenarios.module(scenario)
    with torch.no_grad():
        own.values.add_(rank)  # the first process has the say
    model = DDP(Model(own), process_group=group, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(len(scenario.sizes)):
        optimizer.zero_grad()
        model(scenarios.batch(scenario, step, dist.get_rank(group))).sum().backward()
        optimizer.step()
    return {**scenarios.state(own), "values": own.values.detach().clone()}


RUNS = {
    "learning": Scenario(2, ((5, 5), (4, 4), (6, 6))),
    "learning, unequal": Scenario(3, ((5, 0, 9), (2, 8, 3))),
    "counting": Scenario(2, ((5, 5), (4, 0)), frozen=True),
    "a mask": Scenario(2, ((5, 5), (4, 0)), frozen=True, masked=True),
    "first batch": Scenario(2, ((9, 9), (4, 0)), {"init_mode": "kmeans", "decay": 0.5}),
    "dead codes": Scenario(2, ((9, 9), (4, 0)), DEAD),
}


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_ddp_needs_no_options(processes, name, buffers):
    scenario = RUNS[name]
    found = scenarios.same(processes(scenario.world, _ddp, scenario, {"broadcast_buffers": buffers}))
    values = found.pop("values")
    assert values.isfinite().all()
    if scenario.options:
        return  # random numbers
    scenarios.close(found, scenarios.alone(scenario))


def test_values_are_those_of_one_process(processes):
    """The mean gradient of equal batches: what one process has with half the rate for the sum over the union."""
    scenario = RUNS["learning"]
    found = scenarios.same(processes(2, _ddp, scenario, {}))
    own = scenarios.module(scenario)
    model = Model(own)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.cat([scenarios.batch(scenario, step, rank) for rank in range(2)])).sum().backward()
        optimizer.step()
    scenarios.close(found, {**scenarios.state(own), "values": own.values.detach()})


def test_the_group_of_ddp_is_found(processes):
    """Two of three processes train; the third does nothing at all."""
    scenario = Scenario(2, ((5, 5), (4, 0), (6, 6)))
    idle, *found = processes(3, _ddp, scenario, {}, (1, 2))
    assert idle is None
    found = scenarios.same(found)
    del found["values"]
    scenarios.close(found, scenarios.alone(scenario))


def _subgroups(scenario):
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = scenarios.module(scenario, process_group=groups[rank // 2])
    for step in range(len(scenario.sizes)):
        own(scenarios.batch(scenario, step, rank))
    return scenarios.state(own)


@pytest.mark.parametrize("options", [{}, DEAD])
def test_subgroups_learn_apart(processes, options):
    scenario = Scenario(4, ((5, 5, 3, 1), (4, 0, 2, 2), (6, 6, 0, 0)), options)
    found = processes(4, _subgroups, scenario)
    for pair in (0, 2):
        state = scenarios.same(found[pair : pair + 2])
        if not options:
            own = scenarios.module(scenario)
            for step in range(3):
                own(torch.cat([scenarios.batch(scenario, step, rank) for rank in (pair, pair + 1)]))
            scenarios.close(state, scenarios.state(own))
    assert not torch.equal(found[0]["keys"], found[2]["keys"])


def _by_itself(scenario):
    rank = dist.get_rank()
    own = scenarios.module(scenario, process_group=False)
    for step in range(rank + 1):
        own(scenarios.batch(scenario, step, rank))
    return scenarios.state(own)


def test_a_process_may_learn_alone(processes):
    scenario = Scenario(2, ((5, 5), (4, 4)))
    for rank, found in enumerate(processes(2, _by_itself, scenario)):
        own = scenarios.module(scenario)
        for step in range(rank + 1):
            own(scenarios.batch(scenario, step, rank))
        scenarios.close(found, scenarios.state(own))


# --- join -------------------------------------------------------------------------------------------------------------


def _joined(scenario, buffers, lengths):
    own, rank = scenarios.module(scenario), dist.get_rank()
    model = DDP(Model(own), broadcast_buffers=buffers)
    with kvb.distributed.join(model):
        for step in range(lengths[rank]):
            model(scenarios.batch(scenario, step, rank)).sum().backward()
    return scenarios.state(own)


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lengths", [(3, 1), (0, 2), (1, 3, 2)])
def test_join_goes_on_with_the_others(processes, frozen, buffers, lengths):
    world = len(lengths)
    full = Scenario(world, tuple((4,) * world for _ in range(3)), frozen=frozen)
    found = scenarios.same(processes(world, _joined, full, buffers, lengths))
    own = scenarios.module(full)
    for step in range(max(lengths)):
        own(torch.cat([scenarios.batch(full, step, rank) for rank in range(world) if step < lengths[rank]]))
    scenarios.close(found, scenarios.state(own))


def _lone_join():
    model = DDP(Model(scenarios.module(Scenario(2, ()))))
    try:
        with model.join():
            model(torch.randn(4, C, D))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_join_of_ddp_alone_is_an_error(processes):
    for message in processes(2, _lone_join):
        assert "kvb.distributed.join(model)" in message


def _join_with_rows():
    model = DDP(kvb.distributed.sync_values(Model(scenarios.module(Scenario(2, ())))))
    with pytest.raises(ValueError, match="expected a model without sync_values"), kvb.distributed.join(model):
        pass
    return True


def test_join_needs_dense_gradients(processes):
    assert processes(2, _join_with_rows) == [True, True]


def test_join_takes_ddp_only():
    with (
        pytest.raises(TypeError, match="must be DistributedDataParallel, not Linear"),
        kvb.distributed.join(torch.nn.Linear(1, 1)),
    ):
        pass


# --- processes that do not agree --------------------------------------------------------------------------------------


def _disagreeing(how):
    own, rank = scenarios.module(Scenario(2, ())), dist.get_rank()
    if rank == 0 and how == "frozen":
        own.freeze_keys()
    if how == "sparse":
        own.freeze_keys()
        own.sparse_grad = rank == 0
    before = scenarios.state(own)
    try:
        own(torch.randn(4, C, D))
    except RuntimeError as error:
        assert all(torch.equal(tensor, before[name]) for name, tensor in scenarios.state(own).items())
        own.unfreeze_keys()
        own(torch.randn(4, C, D))  # the processes are still alive
        return str(error)
    return "no error"


def test_one_frozen_process_is_an_error_in_all(processes):
    for message in processes(2, _disagreeing, "frozen"):
        assert "do different things: keys learn in 1, hits are counted in 1" in message
    for message in processes(2, _disagreeing, "sparse"):
        assert "hits are counted in 1, hits are counted by codes in 1" in message


def _absent():
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    own = scenarios.module(Scenario(2, ()), process_group=group)
    if dist.get_rank() == 1:
        return own.eval()(torch.randn(4, C, D)).shape
    try:
        own(torch.randn(4, C, D))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_forward_that_others_do_not_run_is_an_error_in_time(processes):
    message, shape = processes(2, _absent)
    assert message.startswith("a forward in training mode waited for the 2 processes that learn together")
    assert shape == (4, C, V)


# --- another number of processes --------------------------------------------------------------------------------------


def _resumed(scenario, begin, saved):
    own, rank = scenarios.module(scenario), dist.get_rank()
    if saved is not None:
        own.load_state_dict(saved)
    for step in range(begin, len(scenario.sizes)):
        own(scenarios.batch(scenario, step, rank))
    return {name: tensor.clone() for name, tensor in own.state_dict().items()}


def test_resuming_with_other_processes(processes):
    """Four processes, then two, then one, then three: what one process alone has."""
    saved, own = None, scenarios.module(Scenario(1, ()))
    for world in (4, 2, 3):
        scenario = Scenario(world, ((3,) * world, (2,) * world))
        saved = scenarios.same(processes(world, _resumed, scenario, 0, saved))
        for step in range(2):
            own(torch.cat([scenarios.batch(scenario, step, rank) for rank in range(world)]))
    for name in scenarios.STATE:
        torch.testing.assert_close(saved[name], own.get_buffer(name), rtol=1e-5, atol=1e-6)


# --- copies, pickles, graphs ------------------------------------------------------------------------------------------


def _copied():
    import copy
    import io

    own = scenarios.module(Scenario(2, ()), process_group=dist.new_group([0, 1]))
    other = copy.deepcopy(own)
    assert other.process_group is own.process_group
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).process_group is None
    return True


def test_a_group_is_shared_by_copies_and_left_out_of_files(processes):
    assert processes(2, _copied) == [True, True]
    with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup, None .* got str"):
        kvb.KeyValueBottleneck(1, 2, 3, 4, process_group="all")


def test_without_torch_distributed(monkeypatch):
    """As in a PyTorch that was built without it."""
    monkeypatch.setattr(dist, "is_available", lambda: False)
    for name in ("is_initialized", "get_world_size", "get_rank", "all_reduce"):
        monkeypatch.delattr(dist, name)
    own = kvb.KeyValueBottleneck(C, K, D, V, init_mode="kmeans", **DEAD)
    own(torch.randn(40, C, D))
    own.init_keys(torch.randn(40, C, D), progress=False)
    own.freeze_keys()(torch.randn(4, C, D))
    assert own.cluster_size_counter.sum() == 4 * C
