"""Learning the keys: the exact update, sampling, k-means, dead codes, and the published bugs that must stay fixed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kvb import KeyReport, KeyValueBottleneck, bars, reference
from kvb.modules import key_learning

pytestmark = pytest.mark.fallback


def make(C=2, K=8, D=3, V=2, **options):
    return KeyValueBottleneck(C, K, D, V, **options)


def blobs(rows=600, C=2, D=3, count=8, spread=0.01):
    """Rows around ``count`` far-apart centres in every codebook: [rows, C, D] and the centres [C, count, D]."""
    centres = torch.randn(C, count, D) * 10
    label = torch.arange(rows) % count
    return centres[:, label].transpose(0, 1) + spread * torch.randn(rows, C, D), centres


def assert_same_rows(found, wanted, atol):
    """Every wanted row is matched by exactly one found row."""
    distance = torch.cdist(found, wanted)
    assert (distance.amin(-1) < atol).all()
    assert torch.equal(distance.argmin(-1).sort(-1).values, torch.arange(wanted.shape[1]).expand(len(wanted), -1))


def start_from(module, keys):
    """Keys with the statistics of a new module."""
    for name, part in (("keys", keys), ("keys_avg", keys), ("cluster_size", torch.ones(()))):
        getattr(module, name).copy_(part)


# --- moving averages --------------------------------------------------------------------------------------------------


def test_one_update_by_hand():
    """Two pairs on a line: g = 1/2, queries 2 and 4 hit pair 1, nothing hits pair 0."""
    module = make(C=1, K=2, D=1, V=1, decay=0.5, eps=1e-9)
    start_from(module, torch.tensor([[[-1.0], [1.0]]]))
    module(torch.tensor([[[2.0]], [[4.0]]]))
    assert module.cluster_size.tolist() == [[0.5, 1.5]]  # 1/2*1 + 1/2*0, 1/2*1 + 1/2*2
    assert module.keys_avg.tolist() == [[[-0.5], [3.5]]]  # 1/2*-1, 1/2*1 + 1/2*6
    assert module.keys[0, 0].item() == -1  # no hit: the key stays
    torch.testing.assert_close(module.keys[0, 1].item(), 3.5 / 1.5)


def test_starts_at_one_with_matching_averages():
    module = make()
    assert torch.equal(module.cluster_size, torch.ones(2, 8))
    assert torch.equal(module.keys_avg, module.keys)


def test_pairs_without_a_hit_neither_explode_nor_collapse():
    """Published: after one step with threshold 0 an un-hit key reached 3.5e5; from cluster_size 1 it sank by half."""
    module = make(C=1, K=50, D=3)
    near = module.keys[:, :5].transpose(0, 1).contiguous()
    far = module.keys[:, 5:].clone()
    for _ in range(225):
        module(near)
    hit = torch.unique(module.encode(near))
    assert torch.equal(module.keys[:, 5:], far)
    assert module.keys.abs().max() < 10
    assert len(hit) == 5


def test_statistics_are_float64_for_float64_modules():
    module = make().double()
    module(torch.randn(20, 2, 3, dtype=torch.float32))
    module(torch.randn(20, 2, 3, dtype=torch.float64))
    assert module.keys_avg.dtype == torch.float64
    module = make()
    module(torch.randn(20, 2, 3, dtype=torch.float64))
    assert module.keys_avg.dtype == torch.float32


@pytest.mark.parametrize("missing", [(torch, "where"), (reference.statistics, "pack_keys")])
def test_a_failed_update_leaves_the_state_alone(missing, monkeypatch):
    """Out of memory in the middle: everything is computed before anything is written."""
    module = make(threshold_ema_dead_code=0.5)
    state = module.keys, module.keys_avg, module.cluster_size
    before = [part.clone() for part in state]

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(*missing, fail)
    if missing[0] is reference.statistics:  # whichever backend answers otherwise
        monkeypatch.setattr(torch.ops.kvb, "update_keys_", reference.update_keys_)
    with pytest.raises(torch.OutOfMemoryError):
        key_learning.update(
            *state,
            hits=torch.ones(2, 8),
            sums=torch.ones(2, 8, 3),
            queries=torch.randn(9, 1, 2, 3),
            decay=0.5,
            eps=1e-5,
            threshold=0.8,
        )
    monkeypatch.undo()
    assert all(torch.equal(part, old) for part, old in zip(state, before, strict=True))


# --- dead codes -------------------------------------------------------------------------------------------------------


def test_dead_codes_become_queries_with_matching_statistics():
    module = make(C=2, K=8, threshold_ema_dead_code=0.3)
    module.cluster_size[:, 5:] = 0.1
    alive = module.keys[:, :5].clone()
    x = torch.randn(40, 2, 3) * 0.01 + alive[:, 0] + torch.arange(40)[:, None, None] * 1e-3
    x = torch.where(torch.arange(40)[:, None, None] % 7 == 3, float("nan"), x)
    module(x)
    module_keys = module.keys[:, 5:]
    for c in range(2):
        finite = x[:, c][x[:, c].isfinite().all(-1)]
        which = (module_keys[c][:, None] == finite).all(-1)
        assert which.any(-1).all()  # each is a finite query of the batch
        assert which.float().argmax(-1).unique().numel() == 3  # and they differ
    assert torch.equal(module.cluster_size[:, 5:], torch.ones(2, 3))
    assert torch.equal(module.keys_avg[:, 5:], module_keys)


def test_a_replaced_pair_survives_the_next_update():
    """Published: the next update recomputed the key from its stale statistics."""
    module = make(C=1, K=4, threshold_ema_dead_code=0.3)
    module.keys[0, 3] = 1e3  # out of reach: no hit
    module.keys_avg[0, 3] = 1e6
    module.cluster_size[0, 3] = 0.01
    module(torch.randn(30, 1, 3))
    replaced = module.keys[0, 3].clone()
    assert replaced.norm() < 10
    module(module.keys[0, :3, None].clone())
    assert torch.equal(module.keys[0, 3], replaced)
    module(replaced.view(1, 1, 3).expand(50, 1, 3))
    torch.testing.assert_close(module.keys[0, 3], replaced, rtol=1e-4, atol=1e-4)


def test_a_threshold_above_one_starts_over_at_the_threshold():
    module = make(C=1, K=4, threshold_ema_dead_code=3.0)
    module(torch.randn(2, 1, 3))
    assert (module.cluster_size == 3).all()
    torch.testing.assert_close(module.keys_avg, module.keys * 3)


def test_more_dead_codes_than_queries():
    module = make(C=1, K=8, threshold_ema_dead_code=0.5)
    module.cluster_size.zero_()
    x = torch.randn(3, 1, 3)
    module(x)
    which = (module.keys[0][:, None] == x[:, 0]).all(-1)
    assert (which.any(-1) | (module.cluster_size[0] > 0.5)).all()
    assert which.any(0).all()


def test_a_batch_without_a_finite_query_changes_nothing():
    module = make(threshold_ema_dead_code=5.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.full((4, 2, 3), float("nan")))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_dead_code_replacement_keeps_codes_in_use():
    """Published, with threshold 0: 4-7 % of the codes in use after 200 steps."""
    module = make(C=2, K=64, D=4, threshold_ema_dead_code=0.1)
    for _ in range(200):
        module(torch.randn(128, 2, 4) + 5)
    module.freeze_keys()
    module(torch.randn(4000, 2, 4) + 5)
    assert module.fraction_of_unused_keys() < 0.05


# --- initialisation from data -----------------------------------------------------------------------------------------


def test_kmeans_finds_the_centres():
    x, centres = blobs()
    for seed in range(5):
        module = make(init_mode="kmeans++")
        report = module.init_keys(x, epochs=0, progress=False, generator=torch.Generator().manual_seed(seed))
        assert isinstance(report, KeyReport)
        assert_same_rows(module.keys, centres, atol=0.1)
        assert report[:3] + report[4:] == ("kmeans++", 600, 0, 0, 16)
        assert report.inertia == pytest.approx(3 * 0.01**2, rel=0.2)


def test_kmeans_keeps_its_keys_in_the_next_update():
    """Published: keys_avg stayed zero, so keys at a mean of 5.0 fell to 0.25 in one step."""
    module = make(C=1, K=16, init_mode="kmeans", decay=0.95)
    data = torch.randn(500, 1, 3) + 5
    module.init_keys(data, epochs=0, progress=False)
    torch.testing.assert_close(module.keys_avg, module.keys * module.cluster_size[..., None])
    for _ in range(51):
        module(data)
        assert module.keys.mean().item() == pytest.approx(5, abs=0.3)


def test_kmeans_repairs_empty_clusters():
    """Two far groups and a seed that sees one of them only: no cluster may stay empty."""
    x, _ = blobs(count=8)
    module = make(init_mode="kmeans", kmeans_iters=20)
    for seed in range(5):
        report = module.init_keys(x, epochs=0, progress=False, generator=torch.Generator().manual_seed(seed))
        assert report.dead_codes == 0
    duplicated = torch.cat([x[:1].expand(500, -1, -1), x[:40]])
    report = make(init_mode="kmeans").init_keys(duplicated, epochs=0, progress=False)
    assert report.dead_codes == 0


def test_kmeans_lowers_the_inertia():
    x = torch.randn(2000, 2, 3)
    inertia = {}
    for method, iters in (("sample", 1), ("kmeans", 1), ("kmeans", 15)):
        module = make(K=32, kmeans_iters=iters)
        generator = torch.Generator().manual_seed(0)
        inertia[method, iters] = module.init_keys(x, method, epochs=0, progress=False, generator=generator).inertia
    assert inertia["kmeans", 15] < inertia["kmeans", 1] < inertia["sample", 1]


def test_sampled_keys_are_distinct_rows_of_the_data():
    x = torch.randn(300, 2, 3)
    x[7] = float("nan")
    module = make(K=64)
    report = module.init_keys(x, "sample", epochs=0, progress=False)
    for c in range(2):
        which = (module.keys[c][:, None] == x[:, c]).all(-1)
        assert (which.sum(-1) == 1).all()
        assert which.float().argmax(-1).unique().numel() == 64
    assert (report.rows, report.skipped) == (300, 2)
    every = make(K=300)
    with pytest.warns(UserWarning, match="only 299 finite rows for 300 keys"):
        every.init_keys(x, "sample", epochs=0, progress=False)


def test_every_row_is_as_likely_to_be_sampled():
    x = torch.arange(20.0).view(20, 1, 1)
    seen = torch.zeros(20)
    for _ in range(400):
        module = make(C=1, K=5, D=1)
        module.init_keys([x[:7], x[7:12], x[12:]], "sample", epochs=0, progress=False)
        seen[module.keys.flatten().long()] += 1
    assert seen.sum() == 2000
    assert (seen - 100).abs().max() < 40  # 4 standard deviations


def test_fewer_rows_than_keys_warns_once_with_numbers_and_jitters():
    x = torch.randn(5, 2, 3)
    for method in ("sample", "kmeans", "kmeans++"):
        module = make(K=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.init_keys(x, method, epochs=0, progress=False, generator=torch.Generator().manual_seed(0))
        messages = [str(w.message) for w in caught]
        assert messages == ["only 5 finite rows for 8 keys in a codebook: the other 3 keys are copies with jitter"]
        for c in range(2):
            assert torch.unique(module.keys[c], dim=0).shape[0] == 8
        again = make(K=8)
        with pytest.warns(UserWarning, match="copies with jitter"):
            again.init_keys(x, method, epochs=0, progress=False, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again.keys, module.keys)


def test_random_keeps_the_keys_and_learns_for_epochs():
    module = make(init_mode="random", decay=0.5)
    start = module.keys.clone()
    x = torch.randn(100, 2, 3)
    module.init_keys(x, epochs=0, progress=False)
    assert torch.equal(module.keys, start)
    module.init_keys(x, epochs=3, progress=False)
    twin = make(decay=0.5)
    start_from(twin, start)
    for _ in range(3):
        twin(x)
    assert torch.equal(module.keys, twin.keys)


def test_epochs_are_moving_averages_over_batches():
    loader = DataLoader(TensorDataset(torch.randn(60, 2, 3), torch.zeros(60)), batch_size=20)
    module, twin = make(threshold_ema_dead_code=0.0), make()
    twin.load_state_dict(module.state_dict())
    report = module.init_keys(loader, epochs=2, progress=False)
    for _ in range(2):
        for x, _label in loader:
            twin(x)
    assert torch.equal(module.keys, twin.keys)
    assert report.rows == 60
    assert module.cluster_size_counter.sum() == 0


def test_any_source_of_data():
    x = torch.randn(40, 2, 4, 3)
    options = {"epochs": 0, "progress": False}

    def keys_from(data, **more):
        module = make()
        module.init_keys(data, "kmeans", generator=torch.Generator().manual_seed(0), **options, **more)
        return module.keys

    want = keys_from([x])
    assert torch.equal(keys_from(x), want)
    assert torch.equal(keys_from(DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=40)), want)
    assert torch.equal(keys_from([{"image": x}], inputs_extractor=lambda item: item["image"]), want)
    assert torch.equal(keys_from([[x, 1]]), want)
    torch.testing.assert_close(keys_from(x.double()), want)
    torch.testing.assert_close(keys_from([x.half()]), want, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("method", ["sample", "kmeans", "kmeans++"])
def test_streams_are_read_once_for_a_sample_and_once_per_epoch(method):
    seen = []

    def batches():
        for i in range(100):
            seen.append(i)
            yield torch.randn(16, 1, 3)

    class Loader:
        def __iter__(self):
            return batches()

    make(C=1, K=2).init_keys(Loader(), method, epochs=1, progress=False)
    assert seen == [*range(100), *range(100)]


def test_the_first_training_batch_initialises():
    module = make(init_mode="kmeans++", return_values_only=False)
    x, centres = blobs()
    module(x[:0])
    assert "not initialised" in repr(module)
    out = module(x)
    assert_same_rows(module.keys, centres, atol=0.1)
    assert out.distances.max() < 0.1
    assert module.initted.item() == 1


def test_generators_make_it_reproducible():
    x = torch.randn(200, 2, 3)
    for method in ("sample", "kmeans", "kmeans++"):
        made = []
        for _ in range(2):
            module = make()
            torch.rand(3)  # the global state must not matter
            module.init_keys(x, method, epochs=0, progress=False, generator=torch.Generator().manual_seed(4))
            made.append(module.keys)
        assert torch.equal(*made)


def test_nan_rows_never_enter_a_key():
    x = torch.randn(200, 2, 3)
    x[::3] = float("nan")
    x[1::7, 1, 0] = float("inf")
    for method in ("sample", "kmeans", "kmeans++"):
        module = make()
        report = module.init_keys(x, method, epochs=2, progress=False)
        assert module.keys.isfinite().all()
        assert module.keys_avg.isfinite().all()
        assert report.skipped == int((~x.isfinite().all(-1)).sum())


def test_progress_is_shown_when_asked(capsys, monkeypatch):
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    make().init_keys([torch.randn(10, 2, 3)] * 3, epochs=1, progress=True)
    assert "keys: moving averages (pass 1 of 1)" in capsys.readouterr().err
    make().init_keys([torch.randn(10, 2, 3)] * 3, epochs=1, progress=False)
    assert capsys.readouterr().err == ""


def test_the_report_reads_well():
    report = make(C=1, K=4).init_keys(torch.ones(10, 1, 3), epochs=0, progress=False)
    assert str(report) == f"random: 10 rows per codebook (0 skipped), inertia {report.inertia:.6g}, 3 of 4 codes dead"
