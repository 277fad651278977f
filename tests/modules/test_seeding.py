"""k-means++ in blocks draws seeds as the textbook does, one at a time, and as often."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvb import KeyValueBottleneck, bars
from kvb.modules import seeding

pytestmark = pytest.mark.fallback


def textbook(rows, K, generator):
    """Rows [C, R, D] -> seeds [C, K, D], one after the other."""
    C, R, D = rows.shape
    weight, seeds = torch.ones(C, R, dtype=torch.float64), []
    for k in range(K):
        place = torch.multinomial(weight, 1, generator=generator)[..., None].expand(-1, -1, D)
        seeds.append(rows.gather(1, place))
        gap = (rows - seeds[-1]).double().square().sum(-1)
        weight = gap if k == 0 else torch.minimum(weight, gap)
    return torch.cat(seeds, 1)


def probabilities(points, K):
    """Of every sequence of K different rows."""
    R = len(points)
    apart = (points[:, None] - points).double().square().sum(-1)
    found = {}
    for sequence in itertools.permutations(range(R), K):
        chance = 1 / R
        for k in range(1, K):
            weight = apart[list(sequence[:k])].amin(0)
            chance *= float(weight[sequence[k]] / weight.sum())
        found[sequence] = chance
    return found


@pytest.mark.parametrize("candidates", [2, 8])
def test_every_sequence_of_seeds_is_as_likely_as_in_the_textbook(candidates, monkeypatch):
    """Chi-squared of 120 sequences, from blocks that are cut short in all places."""
    monkeypatch.setattr(seeding, "FEWEST", candidates)
    points = torch.tensor([[0.0, 0.0], [0.3, 0.1], [2.0, 1.0], [2.0, 1.5], [-1.0, 4.0]])
    draws = 40_000
    rows = points.expand(draws, -1, -1).contiguous()
    seeds, found = seeding.spread_out(rows, torch.ones(draws, 5, dtype=torch.bool), 4, torch.Generator().manual_seed(1))
    assert found.all()
    places = (seeds[:, :, None] == points).all(-1).float().argmax(-1)
    want = probabilities(points, 4)
    assert sum(want.values()) == pytest.approx(1)
    counts = dict.fromkeys(want, 0)
    for sequence in map(tuple, places.tolist()):
        counts[sequence] += 1
    likely = {sequence: chance * draws for sequence, chance in want.items() if chance * draws >= 5}
    chi = sum((counts[sequence] - mean) ** 2 / mean for sequence, mean in likely.items())
    freedom = len(likely) - 1
    assert freedom > 60
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5  # 4 standard deviations


def data_sets(D, rows):
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(4, rows, D, generator=chance)
    centres = 4 * torch.randn(4, rows // 40, D, generator=chance)
    label = torch.randint(rows // 40, (4, rows, 1), generator=chance)
    yield "normal", normal
    yield "far off", normal + 100
    yield "blobs", centres.gather(1, label.expand(-1, -1, D)) + 0.05 * normal
    yield "heavy tails", normal * torch.rand(4, rows, 1, generator=chance).clamp(min=1e-3).rsqrt()
    yield "a line", normal * torch.tensor([1.0] + [1e-2] * (D - 1))


def inertia(rows, seeds, iterations):
    """After Lloyd iterations; a cluster without rows keeps its key."""
    for _ in range(iterations):
        nearest = torch.cdist(rows, seeds).argmin(-1)
        sums = torch.zeros_like(seeds).scatter_add_(1, nearest[..., None].expand_as(rows), rows)
        hits = torch.zeros(seeds.shape[:2]).scatter_add_(1, nearest, torch.ones(nearest.shape))
        seeds = torch.where(hits[..., None] > 0, sums / hits[..., None].clamp(min=1), seeds)
    return float(torch.cdist(rows, seeds, compute_mode="donot_use_mm_for_euclid_dist").amin(-1).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("D", [2, 14])
def test_inertia_is_that_of_the_textbook(D):
    """Of the seeds, and after ten iterations from them: within 2 % on every kind of data, over eight sets of seeds."""
    for name, rows in data_sets(D, 2048):
        filled = torch.ones(rows.shape[:2], dtype=torch.bool)
        for iterations in (0, 10):
            ours = theirs = 0.0
            for seed in range(8):
                ours_seeds, _ = seeding.spread_out(rows, filled, 256, torch.Generator().manual_seed(seed))
                ours += inertia(rows, ours_seeds, iterations) / 8
                theirs += inertia(rows, textbook(rows, 256, torch.Generator().manual_seed(seed)), iterations) / 8
            print(f"\nD = {D}, {name}, {iterations} iterations: {ours / theirs - 1:+.2%}")
            assert abs(ours / theirs - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_seed_repeats_another_and_none_is_empty(dtype):
    rows = torch.randn(3, 40, 2, dtype=dtype)
    rows[0, 20:] = rows[0, :20]  # twenty rows, each twice
    filled = torch.ones(3, 40, dtype=torch.bool)
    filled[1, 7:] = False
    rows[1, 7:] = 0
    filled[2] = False
    seeds, found = seeding.spread_out(rows, filled, 30, None)
    assert found.sum(-1).tolist() == [20, 7, 0]
    for c, size in ((0, 20), (1, 7)):
        assert {tuple(seed) for seed in seeds[c, :size].tolist()} == {tuple(row) for row in rows[c, :size].tolist()}


def test_distances_beyond_the_dtype_are_the_largest():
    rows = torch.randn(1, 50, 3)
    rows[0, :2] = torch.tensor([[3e38, -3e38, 3e38], [-3e38, 3e38, -3e38]])
    for seed in range(10):
        seeds, found = seeding.spread_out(
            rows, torch.ones(1, 50, dtype=torch.bool), 8, torch.Generator().manual_seed(seed)
        )
        assert found.all()
        assert sorted((seeds[0].abs() > 1e30).any(-1).tolist())[-2:] == [True, True]


def test_many_codebooks_are_seeded_part_by_part(monkeypatch):
    rows, filled = torch.randn(7, 100, 3), torch.ones(7, 100, dtype=torch.bool)
    monkeypatch.setattr(seeding, "ROWS", 200)
    told = []
    seeds, found = seeding.spread_out(rows, filled, 20, None, told.append)
    assert seeds.shape == (7, 20, 3)
    assert found.all()
    assert sum(told) == 140


def test_seeding_and_iterations_show_progress(capsys, monkeypatch):
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    x = torch.randn(200, 2, 3)
    KeyValueBottleneck(2, 8, 3, 2, kmeans_iters=3).init_keys([x], "kmeans++", epochs=0, progress=True)
    shown = capsys.readouterr().err
    for title in ("sampling (pass 1 of 2)", "seeding", "k-means (iteration 3 of 3)", "measuring (pass 2 of 2)"):
        assert f"keys: {title}" in shown
    monkeypatch.undo()
    KeyValueBottleneck(2, 8, 3, 2, kmeans_iters=3).init_keys([x], "kmeans++", epochs=0, progress=True)
    assert capsys.readouterr().err == ""
