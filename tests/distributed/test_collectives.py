"""What processes know together: by hand, in two to four processes, and in one."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from kvb import collectives


def test_a_single_process_gets_its_own_back():
    rows = torch.arange(6.0).view(3, 2)
    assert collectives.world() == 1
    assert collectives.rank() == 0
    assert collectives.total((rows,))[0] is rows
    assert collectives.joined(rows) is rows
    assert list(collectives.in_step([1, 2])) == [1, 2]
    collectives.meet("this")
    assert collectives.shared_seed(generator=torch.Generator().manual_seed(3)) == collectives.shared_seed(
        generator=torch.Generator().manual_seed(3)
    )


def _sums():
    rank = dist.get_rank()
    mine = torch.tensor([1.0, 2.0]) * (rank + 1), torch.full((2, 2), float(rank))
    return collectives.total(mine)


def test_sums(processes):
    for hits, sums in processes(3, _sums):
        assert hits.tolist() == [6, 12]
        assert sums.tolist() == [[3, 3], [3, 3]]


def _rows(sizes):
    rank = dist.get_rank()
    return collectives.joined(torch.full((sizes[rank], 2), rank, dtype=torch.int16))


@pytest.mark.parametrize("sizes", [(2, 2), (0, 3), (3, 1, 0), (0, 0)])
def test_rows_of_all_in_the_order_of_ranks(processes, sizes):
    want = [[rank] * 2 for rank, size in enumerate(sizes) for _ in range(size)]
    for found in processes(len(sizes), _rows, sizes):
        assert found.dtype == torch.int16
        assert found.tolist() == want


def _steps(lengths):
    return list(collectives.in_step(range(lengths[dist.get_rank()])))


def test_loaders_of_unequal_length_end_together(processes):
    assert processes(3, _steps, (2, 0, 3)) == [[0, 1, None], [None, None, None], [0, 1, 2]]


def _seed():
    own = torch.Generator().manual_seed(7 + dist.get_rank())
    return collectives.shared_seed(), collectives.shared_seed(generator=own)


def test_a_seed_is_the_same_everywhere(processes):
    first, second = processes(2, _seed)
    assert first == second
    assert first[0] != first[1]


def _subgroup():
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return collectives.world(group), None
    return collectives.world(group), collectives.joined(torch.tensor([float(dist.get_rank())]), group).tolist()


def test_a_subgroup_works_alone(processes):
    assert processes(3, _subgroup) == [(1, None), (2, [1.0, 2.0]), (2, [1.0, 2.0])]


def _alone():
    if dist.get_rank() == 1:
        return "elsewhere"
    try:
        collectives.meet("init_keys", timeout=timedelta(seconds=2))
    except RuntimeError as error:
        return str(error)
    return "met nobody"


def test_a_process_that_calls_alone_is_told_so(processes):
    message, other = processes(2, _alone)
    assert other == "elsewhere"
    assert message.startswith("init_keys waited for the 2 processes of its group")
    assert "sync=False" in message
