"""The key update as one operator: tables by hand, every backend against the reference, and what the module keeps."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from kvb import KeyValueBottleneck, ops, reference
from kvb.modules import key_learning

pytestmark = [pytest.mark.fallback, pytest.mark.memory]

op = torch.ops.kvb
INTERPRETED = ops.backend("cpu") == "triton"  # which takes its time
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def exact(dtype):
    return torch.promote_types(dtype, torch.float32)


def line(numbers, dtype=torch.float32):
    """[1, K] or, as coordinates, [1, K, 1]."""
    return torch.tensor([numbers], dtype=dtype)


# --- by hand ----------------------------------------------------------------------------------------------------------

KEYS, AVERAGES, SIZES = [8.0, -3.0, 5.0, 1.0], [16.0, -3.0, 1.0, 4.0], [2.0, 1.0, 0.5, 8.0]
HITS, SUMS = [2.0, 0.0, 0.0, 4.0], [8.0, 0.0, 0.0, 20.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("options", "want_keys", "want_averages", "want_sizes"),
    [
        # g = 1/2: sizes (2+2)/2, 1/2, 1/4, (8+4)/2; averages (16+8)/2, ...; without smoothing, as eps is so small
        ({}, [6.0, -3.0, 5.0, 2.0], [12.0, -1.5, 0.5, 12.0], [2.0, 0.5, 0.25, 6.0]),
        ({"rescale_all": True}, [6.0, -3.0, 2.0, 2.0], [12.0, -1.5, 0.5, 12.0], [2.0, 0.5, 0.25, 6.0]),
        # One below 1/2, but not the one at it: the first spare row, doubled in its average.
        ({"spare": [7.0, 9.0]}, [6.0, -3.0, 7.0, 2.0], [12.0, -1.5, 14.0, 12.0], [2.0, 0.5, 2.0, 6.0]),
        # Three of four are dead, in the order of their indices, and two rows go round.
        (
            {"spare": [7.0, 9.0], "threshold": 3.0},
            [7.0, 9.0, 7.0, 2.0],
            [14.0, 18.0, 14.0, 12.0],
            [2.0, 2.0, 2.0, 6.0],
        ),
        ({"spare": [7.0, float("nan")], "usable": 1, "threshold": 9.0}, [7.0] * 4, [14.0] * 4, [2.0] * 4),
        ({"spare": [float("nan")], "usable": 0}, [6.0, -3.0, 5.0, 2.0], [12.0, -1.5, 0.5, 12.0], [2.0, 0.5, 0.25, 6.0]),
        # No hit: nothing moves, but the dead are dead.
        ({"hits": [0.0] * 4, "sums": [0.0] * 4}, KEYS, AVERAGES, SIZES),
        ({"hits": [0.0] * 4, "sums": [0.0] * 4, "rescale_all": True}, KEYS, AVERAGES, SIZES),
        (
            {"hits": [0.0] * 4, "sums": [0.0] * 4, "spare": [4.0], "threshold": 0.75},
            [8.0, -3.0, 4.0, 1.0],
            [16.0, -3.0, 8.0, 4.0],
            [2.0, 1.0, 2.0, 8.0],
        ),
    ],
)
def test_an_update_written_by_hand(options, want_keys, want_averages, want_sizes, dtype, poisoned):
    state = line(KEYS, dtype)[..., None], line(AVERAGES, dtype)[..., None], line(SIZES, dtype)
    hits = line(options.get("hits", HITS), exact(dtype))
    sums = line(options.get("sums", SUMS), exact(dtype))[..., None]
    spare = line(options["spare"], dtype)[..., None] if "spare" in options else None
    usable = torch.tensor([options.get("usable", spare.shape[1])]) if spare is not None else None
    numbers = 0.5, 1e-30, options.get("threshold", 0.5), 2.0, options.get("rescale_all", False)
    packed = op.update_keys_(*state, hits, sums, spare, usable, *numbers)
    for part, want in zip(state, (want_keys, want_averages, want_sizes), strict=True):
        # 1/K of 1e-30 is nothing, but a smoothed size is a product of rounded numbers.
        torch.testing.assert_close(part.flatten(), line(want, dtype)[0], rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(packed, op.pack_keys(state[0]))


def test_smoothing_by_hand():
    """Sizes 1 and 3 with eps = 1: (1+1)/(4+2)*4 = 4/3 and 8/3."""
    state = torch.ones(1, 2, 1), line([4.0, 8.0])[..., None], line([1.0, 3.0])
    op.update_keys_(*state, line([1.0, 3.0]), line([4.0, 8.0])[..., None], None, None, 0.5, 1.0, 0.0, 1.0, False)
    torch.testing.assert_close(state[0].flatten(), torch.tensor([3.0, 3.0]))


# --- every backend ----------------------------------------------------------------------------------------------------


def problem(C=2, K=70, D=14, R=9, dtype=torch.float32, hit=0.5):
    state = torch.randn(C, K, D).to(dtype), torch.randn(C, K, D).to(dtype), torch.rand(C, K).to(dtype) + 0.1
    hits = torch.randint(1, 4, (C, K)).to(exact(dtype)) * (torch.rand(C, K) < hit)
    sums = torch.randn(C, K, D, dtype=exact(dtype)) * hits[..., None]
    spare, usable = torch.randn(C, R, D).to(dtype), torch.arange(R, R - C, -1).clamp(min=0)
    spare[torch.arange(R) >= usable[:, None]] = torch.nan
    return state, hits, sums, spare, usable


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"C": 1},
        {"K": 1},
        {"D": 1},
        {"R": 1},
        {"D": 64},
        {"D": 130},
        {"K": 300, "D": 5},
        {"K": 2, "R": 90},
        {"hit": 0.0},
        {"hit": 1.0},
    ],
    ids=str,
)
def test_every_backend_is_the_reference(sizes, dtype, poisoned):
    state, hits, sums, spare, usable = problem(**sizes, dtype=dtype)
    for threshold, rescale_all, rows in ((0.4, False, True), (9.0, True, True), (9.0, False, False)):
        mine, theirs = [part.clone() for part in state], [part.clone() for part in state]
        given = {"hits": hits, "sums": sums, "spare": spare if rows else None, "usable": usable if rows else None}
        rates = {"decay": 0.7, "eps": 1e-5, "threshold": threshold, "start": 1.25, "rescale_all": rescale_all}
        packed = op.update_keys_(*mine, **given, **rates)
        reference.update_keys_(*theirs, **given, **rates)
        unit = torch.finfo(dtype).eps
        for part, want in zip(mine, theirs, strict=True):
            torch.testing.assert_close(part, want, rtol=4 * unit, atol=8 * torch.finfo(exact(dtype)).eps)
        assert torch.equal(packed, op.pack_keys(mine[0]))
        assert all(part.isfinite().all() for part in mine)
        if not (rows or rescale_all):
            assert torch.equal(mine[0][hits == 0], state[0][hits == 0])


@pytest.mark.parametrize("D", [6, 70])
def test_broken_and_equal_keys_are_packed_like_any(D):
    state, hits, sums, spare, usable = problem(K=40, D=D)
    state[0][:, 7, 3], state[0][:, 9, -1] = torch.nan, torch.inf
    state[0][:, 20:30] = state[0][:, 10:20]
    hits[:, 5:30], sums[:, 5:30] = 0, 0
    before = state[0].clone()
    packed = op.update_keys_(*state, hits, sums, spare, usable, 0.9, 1e-5, 0.0, 1.0, False)
    assert torch.equal(packed, op.pack_keys(state[0]))
    assert torch.equal(state[0][:, 5:30].nan_to_num(), before[:, 5:30].nan_to_num())


def test_the_number_of_threads_changes_no_bit():
    state, *given = problem(C=7, K=90)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            mine = [part.clone() for part in state]
            found.append([op.update_keys_(*mine, *given, 0.7, 1e-5, 0.4, 1.0, False), *mine])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_is_refused_and_moves_nothing():
    state, hits, sums, spare, usable = problem()
    before = [part.clone() for part in state]
    numbers = 0.5, 1e-5, 0.4, 1.0, False
    for given, message in (
        ((state[0][0], *state[1:], hits, sums, spare, usable), "keys"),
        ((state[0], state[1].double(), state[2], hits, sums, spare, usable), "contiguous keys_avg"),
        ((*state[:2], state[2].T, hits, sums, spare, usable), "cluster_size"),
        ((*state, hits.long(), sums, spare, usable), "contiguous hits"),
        ((*state, hits, sums[..., :5], spare, usable), "sums"),
        ((*state, hits, sums, spare, None), "expected spare rows and how many are usable, or neither"),
        ((*state, hits, sums, spare[:, :, :4], usable), "spare"),
        ((*state, hits, sums, spare[:, :0], usable), "spare"),
        ((*state, hits, sums, spare, usable.int()), "usable"),
        (
            (state[0].transpose(1, 2).contiguous().transpose(1, 2), *state[1:], hits, sums, None, None),
            "contiguous keys",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.update_keys_(*given, *numbers)
    assert all(torch.equal(part, old) for part, old in zip(state, before, strict=True))


# --- what the tensors hear of it --------------------------------------------------------------------------------------


def test_autograd_hears_of_all_three_changes():
    state, *given = problem()
    losses = []
    for part in state:
        part.requires_grad_()
        losses.append(part.square().sum())
    with torch.no_grad():
        op.update_keys_(*state, *given, 0.5, 1e-5, 0.4, 1.0, False)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inputs_are_not_touched_and_nothing_is_shared():
    state, *given = problem()
    before = [part.clone() for part in given]
    packed = op.update_keys_(*state, *given, 0.5, 1e-5, 9.0, 1.0, False)
    assert all(torch.equal(part.nan_to_num(), old.nan_to_num()) for part, old in zip(given, before, strict=True))
    places = [part.untyped_storage().data_ptr() for part in (*state, *given, packed)]
    assert len(set(places)) == len(places)


def test_keys_in_other_memory_move_too():
    module = KeyValueBottleneck(2, 9, 3, 2, threshold_ema_dead_code=0.5)
    twin = KeyValueBottleneck(2, 9, 3, 2, threshold_ema_dead_code=0.5)
    twin.load_state_dict(module.state_dict())
    module.keys = module.keys.transpose(0, 1).contiguous().transpose(0, 1)
    for seed in range(3):
        x = torch.randn(5, 2, 3)
        for one in (module, twin):
            torch.manual_seed(seed)
            one(x)
    assert not module.keys.is_contiguous()
    assert torch.equal(module.keys, twin.keys)
    assert torch.equal(module.cluster_size, twin.cluster_size)


# --- the module -------------------------------------------------------------------------------------------------------


def packings_of(module, x):
    """The operators that pack keys in one forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    return [event.name for event in profile.events() if event.name in ("kvb::pack_keys", "kvb::update_keys_")]


def test_keys_that_learn_are_packed_by_their_update():
    module = KeyValueBottleneck(2, 30, 5, 3, threshold_ema_dead_code=0.5)
    x = torch.randn(8, 2, 5)
    assert packings_of(module, x) == ["kvb::pack_keys", "kvb::update_keys_"]
    assert packings_of(module, x) == ["kvb::update_keys_"]
    module.eval()
    assert packings_of(module, x) == []
    with torch.no_grad():
        module.keys += 1
    assert packings_of(module, x) == ["kvb::pack_keys"]
    assert torch.equal(module._packed_keys()[1], op.pack_keys(module.keys))


def test_what_an_update_packed_is_what_would_be_packed():
    module = KeyValueBottleneck(3, 40, 6, 2, threshold_ema_dead_code=0.6)
    for _ in range(4):
        module(torch.randn(20, 3, 6))
        assert torch.equal(module._packed._kept.packed, op.pack_keys(module.keys))


def test_a_traced_forward_keeps_nothing():
    module = KeyValueBottleneck(2, 9, 3, 2, threshold_ema_dead_code=0.5)
    twin = KeyValueBottleneck(2, 9, 3, 2, threshold_ema_dead_code=0.5)
    twin.load_state_dict(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3 if INTERPRETED else 12, 2, 3)
    for one in (compiled, twin, compiled, twin):
        torch.manual_seed(1)
        one(x)
    assert module._packed._kept is None
    torch.testing.assert_close(module.keys, twin.keys)
    module.eval()
    assert torch.equal(module(x), twin.eval()(x))


# --- rows for dead pairs ----------------------------------------------------------------------------------------------


def test_spare_rows_are_finite_queries_first():
    queries = torch.randn(7, 2, 3, 4)
    queries[::2, 0, 1] = torch.nan
    queries[:, :, 2, 1] = torch.inf
    rows, usable = key_learning.spare_rows(queries, 20, torch.float32)
    assert rows.shape == (3, 14, 4)
    assert usable.tolist() == [14, 10, 0]
    for c in range(2):
        found = rows[c, : usable[c]]
        which = (found[:, None] == queries[:, :, c].reshape(-1, 4)).all(-1)
        assert (which.sum(-1) == 1).all()
        assert which.any(0).sum() == usable[c]
    assert key_learning.spare_rows(queries, 5, torch.float32)[0].shape == (3, 5, 4)
    assert key_learning.spare_rows(queries[:0], 5, torch.float32) == (None, None)


def test_a_query_that_only_float64_can_hold_replaces_nothing():
    rows, usable = key_learning.spare_rows(torch.full((2, 1, 1, 3), 1e300, dtype=torch.float64), 4, torch.float32)
    assert rows.dtype == torch.float32
    assert usable.tolist() == [0]


def test_an_update_draws_nothing_where_nothing_can_die():
    module = KeyValueBottleneck(2, 9, 3, 2)
    with mock.patch.object(key_learning, "spare_rows") as draw:
        module(torch.randn(5, 2, 3))
    assert not draw.called
