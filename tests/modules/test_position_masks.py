"""Masked positions: the result is that of the other positions alone, bit for bit, on tables of small integers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kvb import CodeDataset, KeyValueBottleneck, load, save
from kvb.decoders import CodebookVoting
from kvb.modules.key_learning import spare_rows

pytestmark = pytest.mark.fallback

B, C, S, K, D, V = 5, 4, 7, 9, 3, 6  # C a power of two: means of integers are exact


def integers(*shape, low=-3, high=4):
    return torch.randint(low, high, shape).float()


def bottleneck(**options):
    module = KeyValueBottleneck(C, K, D, V, **options)
    with torch.no_grad():
        module.values.copy_(integers(C, K, V))
        module.keys.copy_(integers(C, K, D))
        module.keys_avg.copy_(module.keys)
    return module


def batch(shape=(S,), padding=float("nan")):
    """Inputs with some positions of every sample masked, in one all, in one none; the others hold ``padding``."""
    mask = torch.rand(B, *shape) < 0.6
    mask[0], mask[1] = False, True
    return torch.where(mask[:, None, ..., None], integers(B, C, *shape, D), padding), mask


def alone(x, mask):
    """The positions that count, as samples with one position each: [M, C, D]."""
    return x.movedim(1, -2)[mask]


def counted(part, mask, *, books=True, ranks=False):
    """[B, C, (T), *shape, ...] at the positions that count, as [M, C, (T), ...]."""
    lead = books + ranks
    for _ in range(lead):
        part = part.movedim(1, mask.dim() + lead - 1)  # the axes C and T after the positions, in this order
    return part[mask]


OPTIONS = [
    dict(zip(("topk", "sparse_grad", "return_values_only"), one, strict=True))
    for one in itertools.product((1, 2), (False, True), (True, False))
]


@pytest.mark.parametrize("shape", [(), (S,), (3, 2)])
@pytest.mark.parametrize("pool", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pairs", [False, True])
def test_forward_is_that_of_the_positions_that_count(shape, pool, options, pairs):
    module, (x, mask) = bottleneck(**options).freeze_keys(), batch(shape)
    if pairs:  # one usable pair in the first codebook: fewer than topk
        allowed = torch.rand(C, K) < 0.5
        allowed[0] = torch.arange(K) == 4
        module.mask_pairs(allowed)
    other, ranks, books = copy.deepcopy(module), module.topk > 1, pool == "none"
    out, want = module(x, mask=mask, pool=pool), other(alone(x, mask), pool=pool)
    values, wanted = (one if options["return_values_only"] else one.values for one in (out, want))
    assert torch.equal(counted(values, mask, books=books, ranks=ranks), wanted)
    hidden = ~mask
    assert (counted(values, hidden, books=books, ranks=ranks) == 0).all()
    assert torch.equal(module.cluster_size_counter, other.cluster_size_counter)
    weight = torch.randint(1, 4, wanted.shape).float()
    placed = torch.zeros(*mask.shape, *wanted.shape[1:])
    placed[mask] = weight
    for _ in range(books + ranks):
        placed = placed.movedim(mask.dim() + books + ranks - 1, 1)
    (values * placed).sum().backward()
    (wanted * weight).sum().backward()
    ours, theirs = module.values.grad, other.values.grad
    if options["sparse_grad"]:
        ours, theirs = ours.coalesce(), theirs.coalesce()
        assert torch.equal(ours.indices(), theirs.indices())
        assert torch.equal(ours.values(), theirs.values())
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    if not options["return_values_only"]:
        assert torch.equal(counted(out.indices, mask, ranks=ranks), want.indices)
        assert torch.equal(counted(out.distances, mask, ranks=ranks), want.distances)
        assert torch.equal(counted(out.keys, mask, ranks=ranks), want.keys)
        assert (counted(out.indices, hidden, ranks=ranks) == 0).all()
        assert counted(out.distances, hidden, ranks=ranks).isnan().all()
        assert (counted(out.keys, hidden, ranks=ranks) == 0).all()


def test_a_sparse_gradient_names_no_row_of_padding():
    module, (x, _) = bottleneck(sparse_grad=True).freeze_keys(), batch(padding=0.0)
    module(x, mask=torch.zeros(B, S, dtype=torch.bool)).sum().backward()
    assert module.values.grad.coalesce().indices().shape[1] == 0


def test_inputs_get_a_gradient_where_they_count():
    module, (x, mask) = bottleneck(return_values_only=False).freeze_keys(), batch()
    x.requires_grad_()
    distances = module(x, mask=mask).distances
    distances.nansum().backward()
    other = alone(x.detach(), mask).requires_grad_()
    module(other).distances.sum().backward()
    assert torch.equal(counted(x.grad, mask), other.grad)
    assert (counted(x.grad, ~mask) == 0).all()


@pytest.mark.parametrize("topk", [1, 2])
def test_keys_learn_from_the_positions_that_count(topk):
    module, other = (bottleneck(decay=0.5, topk=topk) for _ in range(2))
    other.load_state_dict(module.state_dict())
    for _ in range(3):
        x, mask = batch()
        module(x, mask=mask)
        other(alone(x, mask))
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    before = copy.deepcopy(module.state_dict())
    module(x, mask=torch.zeros_like(mask))
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_padding_replaces_no_dead_pair():
    queries, K = torch.randn(50, 100, C, D), 8
    mask = torch.zeros(50, 100, dtype=torch.bool)
    mask[3, 10:18] = True
    rows, usable = spare_rows(torch.where(mask[..., None, None], queries, torch.nan), K, torch.float32, counted=mask)
    assert usable.tolist() == [K] * C
    for c in range(C):
        assert sorted(rows[c].tolist()) == sorted(queries[3, 10:18, c].tolist())
    module = bottleneck(threshold_ema_dead_code=5.0, decay=0.5)
    x, mask = batch(padding=100.0)
    module(x, mask=mask)
    assert module.keys.abs().max() < 5
    assert (module.cluster_size == 5).any()


@pytest.mark.parametrize("method", ["random", "sample", "kmeans", "kmeans++"])
@pytest.mark.parametrize("epochs", [0, 2])
def test_init_keys_is_that_of_the_positions_that_count(method, epochs):
    module, other = (KeyValueBottleneck(C, K, D, V, method, threshold_ema_dead_code=0.5) for _ in range(2))
    x, mask = batch((60,))
    reports = [
        one.init_keys(data, epochs=epochs, generator=torch.Generator().manual_seed(1), progress=False, mask=counts)
        for one, data, counts in ((module, x, mask), (other, alone(x, mask), None))
    ]
    if method == "random":
        module.load_state_dict(other.state_dict()) if epochs == 0 else None
    else:
        assert reports[0] == reports[1]
        for name in ("keys", "keys_avg", "cluster_size"):
            assert torch.equal(getattr(module, name), getattr(other, name)), name
    assert reports[0].rows == int(mask.sum()) * max(1, min(1, epochs + 1))
    assert reports[0].skipped == 0
    loader = [(part, "more", counts) for part, counts in zip(x.split(2), mask.split(2), strict=True)]
    options = {"epochs": epochs, "progress": False, "mask_extractor": lambda item: item[2]}
    report = module.init_keys(loader, generator=torch.Generator().manual_seed(1), **options)
    assert report.rows == reports[0].rows


def test_the_first_batch_initialises_without_padding():
    module, (x, mask) = KeyValueBottleneck(C, 4, D, V, "sample"), batch(padding=100.0)
    module(x, mask=torch.zeros_like(mask))
    assert not module.keys_initialised
    module(x, mask=mask)
    assert module.keys_initialised
    assert module.keys.abs().max() < 5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_on_codes_is_training_through_forward(options, tmp_path):
    options = {**options, "return_values_only": True}
    module, (x, mask) = KeyValueBottleneck(C, K, D, V, **options).freeze_keys().eval(), batch()
    data = module.encode_dataset(x, mask=mask, progress=False)
    assert torch.equal(data.mask, mask)
    assert torch.equal(data.codes.long(), module.encode(x, mask=mask))
    filed = module.encode_dataset(x, mask=mask, progress=False, out=tmp_path / "codes.npy")
    for known in (filed, CodeDataset.open(tmp_path / "codes.npy")):
        assert known.labels is None
        assert torch.equal(known.codes, data.codes)
        assert torch.equal(known.mask, mask)
    for pool in ("none", "mean", "sum"):
        grads = []
        for values in (module(x, mask=mask, pool=pool), module.decode(data.codes, pool, mask=data.mask)):
            module.values.grad = None
            (values**2).sum().backward()
            grads.append((values, module.values.grad.to_dense()))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])


def test_a_data_set_keeps_labels_and_masks(tmp_path):
    module, (x, mask) = bottleneck().freeze_keys(), batch()
    y = torch.arange(B)
    loader = [(x[i : i + 2], y[i : i + 2], mask[i : i + 2]) for i in range(0, B, 2)]
    options = {"mask_extractor": lambda item: item[2], "progress": False}
    for out in (None, tmp_path / "codes.npy"):
        data = module.encode_dataset(loader, out=out, **options)
        assert torch.equal(data.labels, y)
        assert torch.equal(data.mask, mask)
        codes, label, one = data[3]
        assert (label, one.tolist()) == (3, mask[3].tolist())
        found = list(torch.utils.data.DataLoader(data, batch_size=2))
        assert torch.equal(torch.cat([one[2] for one in found]), mask)
        assert torch.equal(torch.cat([one[1] for one in data.batches(2, shuffle=False)]), y)
        assert torch.equal(data.to("cpu").mask, mask)
        assert "mask (7,)" in repr(data)
    torch.save(data, tmp_path / "data.pt")
    assert torch.equal(torch.load(tmp_path / "data.pt", weights_only=True).mask, mask)
    assert codes.shape == (C, S)
    with pytest.raises(ValueError, match="expected a mask for all items of data or for none"):
        module.encode_dataset(loader, mask_extractor=lambda item: item[2] if item[1][0] == 0 else None, progress=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_under_a_checkpoint_and_autocast(frozen):
    module = bottleneck(decay=0.5)
    if frozen:
        module.freeze_keys()
    other, (x, mask) = copy.deepcopy(module), batch()
    for one in (module, other):
        for _ in range(2):
            if one is module:
                checkpoint(lambda: module(x, mask=mask), use_reentrant=False).sum().backward()
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    other(x, mask=mask).sum().backward()
    assert torch.equal(module.values.grad, other.values.grad)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())


class Masked(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, mask):
        return self.module(x, mask=mask, pool="mean")


@pytest.mark.compiled
@pytest.mark.parametrize("topk", [1, 2])
def test_compiled_and_exported(topk):
    module, (x, mask) = bottleneck(topk=topk).freeze_keys().eval(), batch()
    want = module(x, mask=mask, pool="mean")
    compiled = torch.compile(Masked(module), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), want)
    exported = torch.export.export(Masked(module), (x, mask))
    assert torch.equal(exported.module()(x, mask), want)


class Voting(nn.Module):
    """Search, decode and vote: everything that looks at the shape of a mask."""

    def __init__(self, module):
        super().__init__()
        self.module, self.vote = module, CodebookVoting(V, topk=module.topk)

    def forward(self, x, mask):
        values = self.module(x, mask=mask)
        codes = self.module.encode(x, mask=mask)
        return self.vote(values, mask), self.module.decode(codes, mask=mask)


@pytest.mark.compiled
@pytest.mark.parametrize("topk", [1, 2])
def test_exported_for_any_number_of_samples_and_positions(topk):
    module, (x, mask) = Voting(bottleneck(topk=topk).freeze_keys()).eval(), batch()
    any_number = torch.export.Dim.DYNAMIC
    sizes = {0: any_number, 2: any_number}, {0: any_number, 1: any_number}
    exported = torch.export.export(module, (x, mask), dynamic_shapes=sizes).module()
    for samples, length in ((B, S), (3, 4), (2, 1), (1, 2)):
        part = x[:samples, :, :length], mask[:samples, :length]
        for got, want in zip(exported(*part), module(*part), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("pool", ["none", "mean"])
@pytest.mark.parametrize("topk", [1, 2])
def test_a_transposed_mask_gives_contiguous_results(topk, pool):
    module, (x, mask) = bottleneck(topk=topk).freeze_keys(), batch()
    transposed = mask.T.contiguous().T
    codes = module.encode(x, mask=transposed)
    found = module(x, mask=transposed, pool=pool, return_values_only=False)
    for got in (*found, module(x, mask=transposed, pool=pool), codes, module.decode(codes, pool, mask=transposed)):
        assert got.is_contiguous()


def test_a_mask_made_in_inference_mode_can_be_trained_with():
    module, (x, mask) = bottleneck().freeze_keys(), batch()
    with torch.inference_mode():
        frozen = mask.clone()
    codes, vote = module.encode(x, mask=mask), CodebookVoting(V)
    grads = []
    for one in (mask, frozen):
        out = vote(module.decode(codes, mask=one), one) + vote(module(x, mask=one), one)
        grads.append(torch.autograd.grad(out.sum(), module.values)[0])
    assert torch.equal(*grads)


def test_an_empty_batch():
    module, x, mask = bottleneck(topk=2), torch.zeros(0, C, S, D), torch.zeros(0, S, dtype=torch.bool)
    assert module(x, mask=mask).shape == (0, C, 2, S, V)
    assert module.decode(module.encode(x, mask=mask), mask=mask).shape == (0, C, 2, S, V)


def test_finite_inputs_are_asked_of_what_counts():
    module, (x, mask) = bottleneck(check_finite=True).freeze_keys(), batch()
    module(x, mask=mask)
    module.encode(x, mask=mask)
    with pytest.raises(ValueError, match="x contains NaN or Inf"):
        module(x)


def test_what_is_wrong_with_a_mask_is_said(tmp_path):
    module, (x, mask) = bottleneck().freeze_keys(), batch()
    codes = module.encode(x, mask=mask)
    calls = [
        lambda mask: module(x, mask=mask),
        lambda mask: module.encode(x, mask=mask),
        lambda mask: module.decode(codes, mask=mask),
        lambda mask: module.encode_dataset(x, mask=mask, progress=False),
        lambda mask: CodeDataset(codes, mask=mask),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"mask must be torch.bool, True where a position counts; got torch.int64"):
            call(mask.long())
        with pytest.raises(TypeError, match=r"argument 'mask' must be Tensor, not list"):
            call(mask.tolist())
        with pytest.raises(ValueError, match=r"expected mask of shape \([BN], \*shape\) = \(5, 7\), got \(5, 6\)"):
            call(mask[:, :6])
    with pytest.raises(ValueError, match=r"expected mask of shape \(N, \*shape\) = \(5, 7\), got \(4, 7\)"):
        module.encode_dataset(x, mask=mask[:4], progress=False)
    with pytest.raises(ValueError, match="mask goes with data that is a tensor, got data of type list: pass mask_extr"):
        module.encode_dataset([x], mask=mask, progress=False)
    with pytest.raises(ValueError, match="mask_extractor goes with data that is iterated, got a tensor: pass mask="):
        module.unfreeze_keys().init_keys(x, mask_extractor=lambda item: mask, progress=False)


def test_a_mask_changes_no_file_of_state(tmp_path):
    module, (x, mask) = bottleneck(), batch()
    module(x, mask=mask)
    save(module, tmp_path / "module.pt")
    assert torch.equal(load(bottleneck(), tmp_path / "module.pt").keys, module.keys)
