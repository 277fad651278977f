"""Values of all processes: dense under DDP, by what was fetched with ``sync_values``, and in ``sgd_step``."""

from __future__ import annotations

import counting
import pytest
import scenarios
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import kvb
from kvb.distributed import sync_values

C, K, D, V = 4, 16, 3, 5
SIZES = {"even": (6, 6), "unequal": (7, 2), "empty": (0, 5), "three": (3, 0, 4)}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.3),
    "RowwiseSGD": lambda params: kvb.optim.RowwiseSGD(params, lr=0.3, weight_decay=0.1),
    "RowwiseAdam": lambda params: kvb.optim.RowwiseAdam(params, lr=0.1),
    "RowwiseAdagrad": lambda params: kvb.optim.RowwiseAdagrad(params, lr=0.1),
}


class Model(nn.Module):
    """A layer before and a layer behind."""

    def __init__(self, options, pool="mean"):
        super().__init__()
        torch.manual_seed(2)
        self.pool = pool
        self.bottleneck = kvb.KeyValueBottleneck(C, K, D, V, **options).freeze_keys()
        self.head = nn.Linear(V, 3)

    def forward(self, x):
        return self.head(self.bottleneck(x, pool=self.pool))


def data(step, rank, n):
    return torch.randn(n, C, D, generator=torch.Generator().manual_seed(10 * step + rank))


def losses(out):
    """Of samples, as one number: the mean over all processes is ``sum / world``."""
    return out.square().sum()


def _trained(kind, sizes, options, optimizer, pool, wrapped, masked):
    rank = dist.get_rank()
    model = Model(options, pool)
    if masked:
        model.bottleneck.mask_pairs(torch.arange(C * K).view(C, K) % 8 == 0)
    if rank:
        with torch.no_grad():
            model.bottleneck.values.zero_()  # the first process has the say
    if kind == "rows":
        sync_values(model)
    outer = DDP(model) if wrapped else model
    stepper = OPTIMIZERS[optimizer](outer.parameters() if wrapped else [model.bottleneck.values])
    for step in range(3):
        stepper.zero_grad()
        losses(outer(data(step, rank, sizes[rank]))).backward()
        assert model.bottleneck.values.grad.is_sparse == options.get("sparse_grad", False)
        stepper.step()
    return {"values": model.bottleneck.values.detach().clone(), **scenarios.state(model.bottleneck)}


def _by_one(sizes, options, optimizer, pool, wrapped, masked):
    model = Model(options, pool)
    if masked:
        model.bottleneck.mask_pairs(torch.arange(C * K).view(C, K) % 8 == 0)
    stepper = OPTIMIZERS[optimizer](model.parameters() if wrapped else [model.bottleneck.values])
    for step in range(3):
        stepper.zero_grad()
        x = torch.cat([data(step, rank, n) for rank, n in enumerate(sizes)])
        (losses(model(x)) / len(sizes)).backward()
        stepper.step()
    return {"values": model.bottleneck.values.detach().clone(), **scenarios.state(model.bottleneck)}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", ["ddp", "rows", "sparse rows"])
def test_values_of_all_batches(processes, name, kind):
    options = {"sparse_grad": kind == "sparse rows"}
    rest = (SIZES[name], options, "RowwiseSGD", "mean", True, False)
    found = scenarios.same(processes(len(SIZES[name]), _trained, kind.split()[-1], *rest))
    scenarios.close(found, _by_one(*rest))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pool", ["none", "sum"])
@pytest.mark.parametrize("topk", [1, 3])
def test_values_by_rows_in_every_form(processes, pool, sparse, topk):
    """Also ranks that find nothing, and without DDP around."""
    rest = ((5, 3), {"sparse_grad": sparse, "topk": topk}, "SGD", pool, False, True)
    found = scenarios.same(processes(2, _trained, "rows", *rest))
    scenarios.close(found, _by_one(*rest))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_optimizers_of_values(processes, optimizer, sparse):
    rest = ((5, 3), {"sparse_grad": sparse}, optimizer, "mean", False, False)
    found = scenarios.same(processes(2, _trained, "rows", *rest))
    scenarios.close(found, _by_one(*rest))


def _accumulated():
    model = sync_values(Model({"sparse_grad": True}))
    outer, rank = DDP(model), dist.get_rank()
    with outer.no_sync():
        losses(outer(data(0, rank, 4))).backward()
    losses(outer(data(1, rank, 4))).backward()
    return {name: p.grad.to_dense() for name, p in model.named_parameters()}


def test_gradients_accumulate(processes):
    found = scenarios.same(processes(2, _accumulated))
    model = Model({})
    (losses(model(torch.cat([data(step, rank, 4) for step in range(2) for rank in range(2)]))) / 2).backward()
    scenarios.close(found, {name: p.grad for name, p in model.named_parameters()})


def _itself():
    """Nothing else to train: no DDP is needed, and none is possible."""
    model = sync_values(kvb.KeyValueBottleneck(C, K, D, V, sparse_grad=True).freeze_keys())
    losses(model(data(0, dist.get_rank(), 4))).backward()
    try:
        DDP(model)
    except RuntimeError as error:
        return {"grad": model.values.grad.to_dense()}, str(error)
    return None


def test_a_bottleneck_by_itself(processes):
    (first, error), (second, _) = processes(2, _itself)
    assert torch.equal(first["grad"], second["grad"])
    assert "not needed when a module doesn't have any parameter" in error


def test_a_single_process_is_left_alone():
    model = sync_values(Model({"sparse_grad": True}))
    losses(model(data(0, 0, 4))).backward()
    assert model.bottleneck.values.grad.is_sparse
    with pytest.raises(ValueError, match="a KeyValueBottleneck in it, got Linear without one"):
        sync_values(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be torch.nn.Module, not int"):
        sync_values(3)


# --- codes ------------------------------------------------------------------------------------------------------------


def _stepped(sizes, V):
    rank = dist.get_rank()
    codes, targets = coded(rank, sizes[rank], V)
    values = torch.zeros(C, K, V)
    steps = [kvb.training.sgd_step(values, codes, targets, process_group=None) for _ in range(3)]
    return {"values": values, "loss": steps[-1].loss, "norm": steps[-1].norm}, steps[-1].logits


def coded(rank, n, V):
    generator = torch.Generator().manual_seed(rank)
    return (
        torch.randint(K, (n, C), generator=generator, dtype=torch.int16),
        torch.randint(V, (n,), generator=generator),
    )


@pytest.mark.parametrize("name", SIZES)
def test_sgd_steps_of_all_batches(processes, name):
    sizes = SIZES[name]
    found = processes(len(sizes), _stepped, sizes, V)
    state = scenarios.same([each for each, _ in found])
    values = torch.zeros(C, K, V)
    parts = [coded(rank, n, V) for rank, n in enumerate(sizes)]
    codes, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    for _ in range(3):
        step = kvb.training.sgd_step(values, codes, targets)
    assert torch.equal(state["values"], values), "the same operator on the same batch"
    assert torch.equal(state["loss"], step.loss)
    assert torch.equal(torch.cat([logits for _, logits in found]), step.logits)


def _padded(sparse, optimizer):
    """Sequences of which some positions count: by autograd with ``sync_values``, and in ``sgd_step``."""
    rank = dist.get_rank()
    bottleneck, x, mask, targets = sync_values(made(sparse)), *sequences(rank)
    values = bottleneck.values.detach().clone()
    stepper = OPTIMIZERS[optimizer]([bottleneck.values])
    losses(bottleneck(x, mask=mask, pool="mean")).backward()
    stepper.step()
    step = kvb.training.sgd_step(values, bottleneck.encode(x, mask=mask), targets, mask=mask, process_group=None)
    return {"values": bottleneck.values.detach(), "stepped": values, "loss": step.loss}


def made(sparse):
    torch.manual_seed(5)
    return kvb.KeyValueBottleneck(C, K, D, V, sparse_grad=sparse).freeze_keys()


def sequences(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3 + rank, C, 6, D, generator=generator)
    mask = torch.rand(3 + rank, 6, generator=generator) > 0.5
    return x, mask, torch.randint(V, (3 + rank,), generator=generator)


@pytest.mark.parametrize("sparse", [False, True])
def test_values_of_positions_that_count(processes, sparse):
    found = scenarios.same(processes(2, _padded, sparse, "RowwiseSGD"))
    bottleneck = made(sparse)
    x, mask, targets = map(torch.cat, zip(sequences(0), sequences(1), strict=True))
    values = bottleneck.values.detach().clone()
    stepper = OPTIMIZERS["RowwiseSGD"]([bottleneck.values])
    (losses(bottleneck(x, mask=mask, pool="mean")) / 2).backward()
    stepper.step()
    step = kvb.training.sgd_step(values, bottleneck.encode(x, mask=mask), targets, mask=mask)
    scenarios.close(found, {"values": bottleneck.values.detach(), "stepped": values, "loss": step.loss})


def _outside():
    codes, targets = coded(0, 4, V)
    codes = codes.to(torch.int64)
    if dist.get_rank() == 1:
        codes[0, 0] = 65536
    try:
        kvb.training.sgd_step(torch.zeros(C, K, V), codes, targets, process_group=None)
    except IndexError:
        return "IndexError"
    return "no error"


def test_a_code_outside_is_an_error_in_all(processes):
    assert processes(2, _outside) == ["IndexError"] * 2


def _decoded(sparse):
    """The loop of the guide: codes once, by every process of its own part, then any loss and optimizer."""
    torch.manual_seed(1)
    bottleneck = kvb.KeyValueBottleneck(C, K, D, V, sparse_grad=sparse).freeze_keys()
    sync_values(bottleneck)
    own = bottleneck.encode_dataset([(data(0, dist.get_rank(), 6), torch.arange(6) % V)], progress=False)
    optimizer = kvb.optim.RowwiseAdam([bottleneck.values], lr=0.1)
    for codes, targets in own.batches(3, shuffle=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(bottleneck.decode(codes, pool="mean"), targets).backward()
        kvb.optim.clip_grad_norm_([bottleneck.values], 1.0)
        optimizer.step()
    return {"values": bottleneck.values.detach()}


@pytest.mark.parametrize("sparse", [False, True])
def test_decoding_under_several_processes(processes, sparse):
    found = scenarios.same(processes(2, _decoded, sparse))
    torch.manual_seed(1)
    bottleneck = kvb.KeyValueBottleneck(C, K, D, V, sparse_grad=sparse).freeze_keys()
    codes = [bottleneck.encode(data(0, rank, 6)) for rank in range(2)]
    optimizer = kvb.optim.RowwiseAdam([bottleneck.values], lr=0.1)
    for begin in (0, 3):
        optimizer.zero_grad()
        both = torch.cat([each[begin : begin + 3] for each in codes])
        targets = (torch.arange(begin, begin + 3) % V).repeat(2)
        nn.functional.cross_entropy(bottleneck.decode(both, pool="mean"), targets).backward()
        kvb.optim.clip_grad_norm_([bottleneck.values], 1.0)
        optimizer.step()
    scenarios.close(found, {"values": bottleneck.values.detach()})


# --- bytes ------------------------------------------------------------------------------------------------------------


def _bytes(sizes, kind):
    B, C, K, D, V = sizes
    bottleneck = kvb.KeyValueBottleneck(C, K, D, V, sparse_grad=kind != "dense").freeze_keys()
    if kind != "dense":
        sync_values(bottleneck)
    x, outer = torch.randn(B, C, D), DDP(bottleneck, broadcast_buffers=False) if kind == "dense" else bottleneck
    with counting.counted(outer if kind == "dense" else None) as sent:
        if kind == "codes":
            bottleneck.decode(torch.randint(K, (B, C)), pool="mean").sum().backward()
        else:
            outer(x, pool="mean").sum().backward()
    return sent.bytes, sent.calls


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(16, 32, 512, 4, 10), pytest.param((256, 256, 4096, 8, 10), marks=pytest.mark.slow)])
def test_bytes_of_a_training_step(processes, sizes, world):
    """By what was fetched against dense: counted, with the counting of hits, and as the documentation predicts them."""
    B, C, K, _, V = sizes
    found = {kind: processes(world, _bytes, sizes, kind)[0] for kind in ("dense", "rows", "codes")}
    table, counts, fetched = 4 * C * K * V, 4 * C * K, B * (2 * C + 4 * V)
    ring, header, size = 2 * (world - 1) / world, 16 * (world - 1), 8 * (world - 1)
    assert found["dense"] == (pytest.approx(ring * (table + counts) + header), 3)
    assert found["codes"] == (pytest.approx((world - 1) * fetched + size), 2)
    assert found["rows"] == (pytest.approx((world - 1) * fetched + size + header), 4), "codes once"
    print(f"\n{sizes}, {world} processes: {found}")
    if K == 4096:
        for kind in ("rows", "codes"):
            assert found[kind][0] <= found["dense"][0] / 100


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("own_group", [False, True])
def test_codes_are_sent_once_where_hits_are_counted(processes, sparse, own_group):
    """Also with dense gradients; and twice where those who count are others than those who share values."""
    calls = {False: 4, True: 5}[own_group]
    found = processes(2, _counting, sparse, own_group)
    assert {each for _, each in found} == {calls}
    scenarios.same([state for state, _ in found])


def _counting(sparse, own_group):
    torch.manual_seed(2)
    bottleneck = kvb.KeyValueBottleneck(C, K, D, V, sparse_grad=sparse, topk=2).freeze_keys()
    sync_values(bottleneck, dist.new_group([0, 1]) if own_group else None)
    with counting.counted() as sent:
        bottleneck(data(0, dist.get_rank(), 5 + dist.get_rank()), pool="mean").sum().backward()
    grad = bottleneck.values.grad
    return {"grad": grad.to_dense(), **scenarios.state(bottleneck)}, sent.calls


def _sent(kind):
    B, (C, K, D, V) = 6, (4, 64, 3, 5)
    options = {"threshold_ema_dead_code": 0.9} if kind == "dead" else {"sparse_grad": kind == "counts by codes"}
    bottleneck = kvb.KeyValueBottleneck(C, K, D, V, **options)
    if kind.startswith("counts"):
        bottleneck.freeze_keys()
    with counting.counted() as sent:
        if kind == "sgd_step":
            codes, targets = torch.zeros(B, C, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
            kvb.training.sgd_step(bottleneck.values, codes, targets, process_group=None)
        elif kind == "eval":
            bottleneck.eval()(torch.randn(B, C, D))
            bottleneck.encode_dataset(torch.randn(B, C, D), progress=False)
        else:
            bottleneck(torch.randn(B, C, D))
    return sent.bytes, sent.calls


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_of_the_documentation(processes, world):
    """Besides a few numbers about sizes and what is about to be done."""
    B, C, K, D, ring, others = 6, 4, 64, 3, 2 * (world - 1) / world, world - 1
    want = {
        "learning": (2, ring * 4 * C * K * (D + 1) + others * 16),
        "dead": (4, ring * 4 * C * K * (D + 1 + D) + others * (4 * C * K + 16)),
        "counts": (2, ring * 4 * C * K + others * 16),
        "counts by codes": (3, others * (B * C * 2 + 16 + 8)),
        "sgd_step": (2, others * (B * (C * 2 + 8) + 8)),
        "eval": (0, 0),
    }
    for kind, (calls, sent) in want.items():
        assert processes(world, _sent, kind)[0] == (pytest.approx(sent), calls), kind
