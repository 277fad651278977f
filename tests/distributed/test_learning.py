"""Keys and counts that several processes learn together: bitwise the same in all of them, and those of one process."""

from __future__ import annotations

import pytest
import scenarios
import torch
from scenarios import Scenario

EVEN = ((5, 5), (4, 4), (6, 6))
DEAD = {"threshold_ema_dead_code": 0.9}
LEARNING = {
    "even batches": Scenario(2, EVEN),
    "unequal batches": Scenario(3, ((5, 1, 9), (2, 8, 3), (1, 1, 30))),
    "an empty batch": Scenario(2, ((5, 0), (0, 4), (6, 6))),
    "three of four are empty": Scenario(4, ((5, 0, 0, 0), (0, 0, 4, 0), (1, 2, 3, 4))),
    "all are empty": Scenario(2, ((5, 4), (0, 0), (6, 6))),
    "NaN in one": Scenario(2, EVEN, nan={(0, 1): 4, (2, 0): 2}),
    "nothing but NaN in one": Scenario(3, ((5, 5, 2), (4, 4, 2)), nan={(0, 1): 15, (1, 2): 6}),
    "nothing but NaN in all": Scenario(2, ((5, 5), (4, 4)), nan={(0, 0): 15, (0, 1): 15}),
    "keys of float64": Scenario(2, EVEN, keys=torch.float64),
    "queries of bfloat16": Scenario(2, EVEN, dtype=torch.bfloat16),
    "a mask": Scenario(2, EVEN, masked=True),
    "more positions": Scenario(2, EVEN, shape=(2, 3)),
    "padding": Scenario(2, ((5, 3), (0, 4), (1, 6)), shape=(7,), padded=True),
    "fast averages": Scenario(3, ((3, 2, 1), (1, 2, 3)), {"decay": 0.0}),
    "no steps": Scenario(2, ()),
}
COUNTING = {
    "counts": Scenario(2, EVEN, frozen=True),
    "counts of unequal batches": Scenario(3, ((5, 0, 9), (2, 8, 0)), frozen=True),
    "counts of NaN": Scenario(2, EVEN, frozen=True, nan={(0, 1): 4, (1, 0): 12}),
    "counts of ranks": Scenario(2, EVEN, {"topk": 3}, frozen=True),
    "counts of ranks that find nothing": Scenario(2, EVEN, {"topk": 8}, frozen=True, masked=True),
    "counts by codes": Scenario(3, ((5, 0, 9), (2, 8, 0)), {"sparse_grad": True}, frozen=True),
    "counts of padding": Scenario(2, ((5, 3), (0, 4)), frozen=True, shape=(7,), padded=True),
    "counts by codes of padding": Scenario(2, ((5, 3),), {"sparse_grad": True}, frozen=True, shape=(7,), padded=True),
    "counts by codes of NaN": Scenario(2, EVEN, {"sparse_grad": True}, frozen=True, nan={(0, 1): 4, (1, 0): 12}),
    "counts by codes of ranks": Scenario(2, EVEN, {"sparse_grad": True, "topk": 8}, frozen=True, masked=True),
}


@pytest.mark.parametrize("name", [*LEARNING, *COUNTING])
def test_all_hold_what_one_process_has(processes, name):
    scenario = {**LEARNING, **COUNTING}[name]
    found = scenarios.same(processes(scenario.world, scenarios.together, scenario))
    scenarios.close(found, scenarios.alone(scenario))


REPLACING = {
    "dead codes": Scenario(2, EVEN, DEAD),
    "dead codes in three": Scenario(3, ((5, 1, 9), (2, 8, 3)), DEAD),
    "queries in one process only": Scenario(3, ((0, 9, 0),), DEAD),
    "fewer queries than dead codes": Scenario(2, ((1, 2), (1, 0)), DEAD),
    "NaN among the queries": Scenario(2, ((5, 5),), DEAD, nan={(0, 0): 12, (0, 1): 9}),
    "no query at all": Scenario(2, ((0, 0),), DEAD),
    "dead codes of float64": Scenario(2, EVEN, DEAD, keys=torch.float64),
    "dead codes of more positions": Scenario(2, EVEN, DEAD, shape=(3,)),
}


@pytest.mark.parametrize("name", REPLACING)
def test_dead_codes_become_queries_of_all(processes, name):
    """Which ones die is not random; what they become is, among the finite queries of all processes."""
    scenario = REPLACING[name]
    found = scenarios.same(processes(scenario.world, scenarios.together, scenario))
    one_step = scenario._replace(sizes=scenario.sizes[:1])
    found_first = scenarios.same(processes(scenario.world, scenarios.together, one_step))
    want = scenarios.alone(one_step)
    torch.testing.assert_close(found_first["cluster_size"], want["cluster_size"], rtol=1e-5, atol=1e-6)
    kept = scenarios.alone(one_step._replace(options={}))
    rows = torch.cat([scenarios.batch(scenario, 0, rank) for rank in range(scenario.world)]).to(found["keys"].dtype)
    for c in range(scenarios.C):
        queries = rows[:, c].reshape(-1, scenarios.D)
        queries = queries[queries.isfinite().all(-1)]
        alive = kept["cluster_size"][c] >= 0.9
        if len(queries) == 0:
            alive[:] = True
        torch.testing.assert_close(found_first["keys"][c][alive], kept["keys"][c][alive], rtol=1e-5, atol=1e-6)
        fresh = found_first["keys"][c][~alive]
        drawn = [int((queries == key).all(-1).nonzero()[0, 0]) for key in fresh]
        assert len(set(drawn)) == min(len(queries), len(fresh)), "different pairs get different queries"


def test_queries_of_every_process_replace_dead_codes(processes):
    """Of two batches of 100 and 20 queries, the second gives about a sixth of 8 * 3 keys; here, not none."""
    scenario = Scenario(2, ((100, 20),), {"threshold_ema_dead_code": 1e6})
    keys = scenarios.same(processes(2, scenarios.together, scenario))["keys"]
    second = scenarios.batch(scenario, 0, 1)
    of_second = sum(int((second[:, c] == keys[c, k]).all(-1).any()) for c in range(3) for k in range(8))
    assert 0 < of_second < 12
