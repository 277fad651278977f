"""``KeyValueBottleneck``: shapes, modes, tracing, and the promises about gradients and memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from small_models import make
from torch import nn

from kvb import BottleneckOutput, KeyValueBottleneck, ops
from kvb.decoders import CodebookVoting
from kvb.splitters import RandomProjection

pytestmark = pytest.mark.fallback


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("learning", [True, False])
def test_documented_shapes_contiguous(topk, shape, batch, learning, poisoned):
    module = make(topk=topk, return_values_only=False)
    if not learning:
        module.freeze_keys()
    x = torch.randn(batch, 3, *shape, 5)
    out = module(x)
    ranks = (topk,) if topk > 1 else ()
    assert isinstance(out, BottleneckOutput)
    assert out.values.shape == (batch, 3, *ranks, *shape, 4)
    assert out.keys.shape == (batch, 3, *ranks, *shape, 5)
    assert out.indices.shape == out.distances.shape == (batch, 3, *ranks, *shape)
    assert all(part.is_contiguous() for part in out)
    module.return_values_only = True
    assert module(x).shape == out.values.shape


@pytest.mark.parametrize("topk", [1, 2])
def test_output_is_what_the_definition_says(topk):
    module = make(topk=topk, return_values_only=False).eval()
    x = torch.randn(6, 3, 2, 4, 5)
    values, keys, indices, distances = module(x)
    exact = (x[..., None, :].double() - module.keys[:, None, None].double()).square().sum(-1)
    want = exact.sort(dim=-1, stable=True)
    best = want.indices[..., :topk].movedim(-1, 2)
    best = best if topk > 1 else best[:, :, 0]
    assert torch.equal(indices, best)
    book = torch.arange(3).view(3, *[1] * (best.dim() - 2))
    assert torch.equal(values, module.values[book, best])
    assert torch.equal(keys, module.keys[book, best])
    least = want.values[..., :topk].movedim(-1, 2).float()
    assert torch.equal(distances, least if topk > 1 else least[:, :, 0])


def test_encode_and_decode_are_the_forward():
    module = make(topk=2, return_values_only=False).eval()
    x = torch.randn(6, 3, 2, 4, 5)
    codes = module.encode(x, dtype="auto")
    assert codes.dtype == torch.int16
    out = module(x)
    assert torch.equal(codes.long(), out.indices)
    assert torch.equal(module.decode(codes), out.values)
    assert module.decode(codes, "mean").shape == (6, 2, 2, 4, 4)
    torch.testing.assert_close(module.decode(codes, "mean"), out.values.mean(1))
    torch.testing.assert_close(module.decode(codes, "sum"), out.values.sum(1))
    assert torch.equal(module.decode(codes[:, :, 0, 0, 0]), out.values[:, :, 0, 0, 0])
    assert module.encode(x).dtype == torch.int64


def test_encode_changes_nothing():
    module = make(threshold_ema_dead_code=5.0)
    before = {name: buffer.clone() for name, buffer in module.state_dict().items()}
    module.encode(torch.randn(9, 3, 5))
    module.freeze_keys().encode(torch.randn(9, 3, 5))
    module.unfreeze_keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.state_dict().items())


def test_eval_mode_mutates_nothing():
    """Published: moving averages and counts also ran in eval mode and under no_grad."""
    for prepare in (lambda m: m, lambda m: m.freeze_keys()):
        module = prepare(make(threshold_ema_dead_code=5.0)).eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        module(torch.randn(9, 3, 5))
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_training_mode_learns_then_counts():
    module = make()
    x = torch.randn(9, 3, 2, 5)
    start = module.keys.clone()
    module(x)
    assert not torch.equal(module.keys, start)
    assert module.cluster_size_counter.sum() == 0
    module.freeze_keys()
    frozen = module.keys.clone()
    module(x)
    assert torch.equal(module.keys, frozen)
    assert torch.equal(module.cluster_size_counter.sum(1), torch.full((3,), 18.0))
    module.unfreeze_keys()
    module(x)
    assert not torch.equal(module.keys, frozen)
    assert module.cluster_size_counter.sum() == 3 * 18


def test_counts_include_every_rank():
    module = make(topk=4).freeze_keys()
    module(torch.randn(9, 3, 5))
    assert torch.equal(module.cluster_size_counter.sum(1), torch.full((3,), 36.0))


def test_deactivated_counts_restrict_the_search():
    module = make(return_values_only=False).freeze_keys()
    seen = module(torch.randn(4, 3, 5)).indices
    module.deactivate_counts()
    x = torch.randn(200, 3, 5)
    for mode in (True, False):
        got = module.train(mode)(x).indices
        for c in range(3):
            assert set(got[:, c].tolist()) <= set(seen[:, c].tolist())
    assert module.cluster_size_counter.sum() == 12
    module.activate_counts()
    assert module.eval()(x).indices.unique().numel() == 11


def test_manual_mask_joins_the_counted_pairs():
    module = make(C=1, return_values_only=False).freeze_keys()
    module(module.keys[:, :6].transpose(0, 1))
    module.deactivate_counts()
    mask = torch.zeros(1, 11, dtype=torch.bool)
    mask[0, 4:9] = True
    module.mask_pairs(mask)
    mask.fill_(True)  # the module keeps a copy
    assert module(torch.randn(300, 1, 5)).indices.unique().tolist() == [4, 5]
    module.mask_pairs(None)
    assert module(torch.randn(300, 1, 5)).indices.unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_reset_counts_again():
    module = make().freeze_keys()
    module(torch.randn(4, 3, 5))
    module.deactivate_counts().reset_cluster_size_counter()
    assert module.count_cluster_size
    assert module.fraction_of_unused_keys() == 1


def test_usage_and_perplexity():
    module = make(C=2, K=4)
    module.cluster_size_counter.copy_(torch.tensor([[2.0, 2.0, 0.0, 0.0], [0.0] * 4]))
    assert module.usage().tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(module.perplexity(), torch.tensor([2.0, 0.0]))
    assert module.fraction_of_unused_keys() == 0.75


def test_temperature_samples_in_eval_too():
    module = make(sample_codebook_temperature=10.0, return_values_only=False).eval()
    x = torch.randn(1, 3, 5).expand(500, -1, -1)
    out = module(x)
    assert out.indices[:, 0].unique().numel() > 5
    chosen = out.keys
    torch.testing.assert_close(out.distances, (x - chosen).square().sum(-1))


def test_gradients_reach_fetched_rows_only():
    module = make().freeze_keys()
    x = torch.randn(6, 3, 5, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert x.grad is None
    fetched = torch.zeros(3, 11, dtype=torch.bool)
    fetched[torch.arange(3), module.encode(x)] = True
    assert torch.equal(module.values.grad.abs().sum(-1) > 0, fetched)


def test_distances_can_be_learned_through_while_keys_learn():
    module = make(return_values_only=False)
    x = torch.randn(6, 3, 5, requires_grad=True)
    out = module(x)
    out.distances.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - out.keys))


def test_an_empty_batch_changes_nothing_and_has_gradients():
    module = make(threshold_ema_dead_code=5.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for shape in ((0, 3, 5), (2, 3, 0, 5)):
        module(torch.randn(shape)).sum().backward()
        assert torch.equal(module.values.grad, torch.zeros(3, 11, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.encode(torch.randn(0, 3, 2, 5)).shape == (0, 3, 2)


def test_nan_stays_in_its_row():
    """Published: one NaN sample turned the whole codebook NaN."""
    module = make(return_values_only=False, threshold_ema_dead_code=0.5)
    for _ in range(20):
        x = torch.randn(9, 3, 5)
        x[4] = float("nan")
        x[5, 1, 2] = float("inf")
        out = module(x)
        assert (out.indices[4] == 0).all()
        assert out.distances[4].isnan().all()
        assert out.distances[5].isnan().tolist() == [False, True, False]
        assert out.values.isfinite().all()
    assert module.keys.isfinite().all()
    assert module.keys_avg.isfinite().all()
    module.freeze_keys()
    module(x)
    assert module.cluster_size_counter.sum(1).tolist() == [8, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double"])
def test_every_dtype_meets_every_module(convert, dtype):
    """Indices are those of the rounded input; values keep their dtype; keys and statistics never lose precision."""
    module = getattr(make(return_values_only=False), convert)()
    x = torch.randn(8, 3, 5).to(dtype)
    out = module(x)
    assert out.values.dtype == module.values.dtype
    wide = torch.float64 if convert == "double" else torch.float32
    for name in ("keys", "keys_avg", "cluster_size"):
        assert getattr(module, name).dtype == wide
    assert module.cluster_size_counter.dtype == torch.int64
    assert out.distances.dtype == (torch.float64 if torch.float64 in (wide, dtype) else torch.float32)
    assert torch.equal(module.eval()(x).indices, module(x.double()).indices)
    out.values.sum().backward()
    assert module.values.grad.dtype == module.values.dtype


def test_half_keeps_keys_and_statistics_to_the_last_bit():
    module = make()
    module(torch.randn(9, 3, 5))
    before = {name: getattr(module, name).clone() for name in ("keys", "keys_avg", "cluster_size")}
    module.half().bfloat16().float()
    for name, value in before.items():
        assert torch.equal(getattr(module, name), value), name


def test_autocast_changes_no_index():
    module = make(return_values_only=False).eval()
    x = torch.randn(64, 3, 5) + 100
    want = module(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            got = module(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_input_strides_do_not_matter():
    module = make(return_values_only=False).eval()
    x = torch.randn(4, 3, 2, 6, 5)
    want = module(x)
    for variant in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.movedim(-1, 1).contiguous().movedim(1, -1),
        torch.cat([x, x])[4:],
        torch.stack([x, x], -1)[..., 0],
    ):
        before = variant.clone()
        assert all(torch.equal(a, b) for a, b in zip(module(variant), want, strict=True))
        assert torch.equal(variant, before)
    row = module(x[:1].expand(4, -1, -1, -1, -1)).indices
    assert torch.equal(row, want.indices[:1].expand_as(row))


# --- promises ---------------------------------------------------------------------------------------------------------


def test_repr_says_what_matters():
    module = make(C=2, K=1000, V=100)
    text = repr(module)
    assert "2 codebooks x 1000 pairs, keys 5-d learning, values 100-d (0.8 MB), topk=1" in text
    assert f"topk=1, backend={ops.backend('cpu')}" in text
    assert "frozen" in repr(module.freeze_keys())
    assert "not initialised" in repr(make(init_mode="kmeans"))


def test_threads_may_share_a_module_in_eval():
    module = make(C=4, K=300).freeze_keys().eval()
    inputs = [torch.randn(50, 4, 5) for _ in range(8)]
    want = [module(x) for x in inputs]
    module.refresh_keys()
    wrong = []

    def work(x, expected):
        for _ in range(20):
            if not torch.equal(module(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bottleneck_between_splitter_and_decoder_learns():
    splitter, vote = RandomProjection(12, 8, 4), CodebookVoting(3)
    bottleneck = KeyValueBottleneck(8, 32, 4, 3, init_mode="sample")
    x, y = torch.randn(300, 12), torch.randint(3, (300,))
    x = x + nn.functional.one_hot(y, 12) * 4
    bottleneck.init_keys(splitter(x), progress=False)
    nn.init.zeros_(bottleneck.values)
    model = nn.Sequential(splitter, bottleneck.freeze_keys(), vote)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(x).argmax(-1) == y).float().mean() > 0.95


PEAK = textwrap.dedent("""
    import resource, torch, kvb
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    module = kvb.KeyValueBottleneck(256, 4096, 14, 10, return_values_only=False, threshold_ema_dead_code=0.00625)
    x = torch.randn(256, 256, 14)
    kvb.KeyValueBottleneck(1, 4, 14, 10)(x[:1, :1])  # warm up libraries
    for mode in ("learning", "counting", "eval"):
        before = peak()
        if mode == "learning":
            module(x)
        elif mode == "counting":
            module.freeze_keys()(x)
        else:
            module.eval()(x)
        print(peak() - before)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_peak_memory_of_one_forward_at_the_papers_size():
    """B=256, C=256, K=4096, D=14, V=10: at most 256 MB beyond the module and its input (published: 3.7 GB)."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    learning, counting, evaluating = map(float, done.stdout.split())
    print(f"\npeak extra memory: learning {learning:.0f} MB, counting {counting:.0f} MB, eval {evaluating:.0f} MB")
    assert learning <= 256
    assert counting <= 256
    assert evaluating <= 256
