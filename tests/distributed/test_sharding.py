"""A table split over codebooks or over pairs gives what one process gives: indices bit for bit, sums to rounding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from sharding_cases import CASES, GIANT, mesh, near, pair, queries, same_state, whole

import kvb
from kvb.distributed import exchange, parallelize
from kvb.optim import RowwiseAdagrad, RowwiseAdam, RowwiseSGD, clip_grad_norm_
from kvb.testing.data import clusters, near_duplicates, offset
from kvb.training import sgd_step

HALVES = range(0, len(CASES), 11)


def _looked_up(split, begin):
    """Every output of every way to look up, in 4 processes."""
    for number, case in list(enumerate(CASES if split == "codebooks" else GIANT))[begin : begin + 11]:
        alone, there = (each.eval() for each in pair(case, (4,), **{split: "table"}))
        x, what = queries(case), f"case {number}"
        wanted, found = alone(x), there(x)
        assert torch.equal(found.indices, wanted.indices), what
        assert found.distances.equal(wanted.distances) or wanted.distances.isnan().any(), what
        near(found.distances, wanted.distances, what)
        near(found.keys, wanted.keys, what)
        near(found.values, wanted.values, what)
        codes = there.encode(x, dtype="auto")
        assert torch.equal(codes, alone.encode(x, dtype="auto")), what
        padding = torch.rand(x.shape[0], *x.shape[2:-1], generator=torch.Generator().manual_seed(3)) > 0.4
        padded = there(x, mask=padding), alone(x, mask=padding)
        assert torch.equal(padded[0].indices, padded[1].indices), what
        near(padded[0].values, padded[1].values, f"{what}, padded")
        near(there.decode(codes, "sum", mask=padding), alone.decode(codes, "sum", mask=padding), what, scale=20)
        for pool in ("none", "mean", "sum"):
            scale = case.C * case.options.get("topk", 1)
            near(
                there(x, pool=pool, return_values_only=True),
                alone(x, pool=pool, return_values_only=True),
                f"{what}, {pool}",
                scale=4 * scale,
            )
            near(there.decode(codes, pool), alone.decode(codes, pool), f"{what}, {pool}", scale=4 * scale)
        there.pool = "sum"  # as its constructor would have it
        assert torch.equal(there.decode(codes), there.decode(codes, "sum")), what
        assert torch.equal(there(x, return_values_only=True), there(x, pool="sum", return_values_only=True)), what


@pytest.mark.parametrize("begin", HALVES)
@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_lookups_are_those_of_one_process(processes, split, begin):
    processes(4, _looked_up, split, begin)


def _near_ties():
    """Keys one unit in the last place apart, on both sides of a border, and two clusters far from the origin."""
    for data in (near_duplicates, offset, clusters):
        for D in (3, 14, 64):
            torch.manual_seed(D)
            x, keys = data(200, 2, 128, D)
            keys = keys[:, torch.randperm(128)]
            alone, there = (kvb.KeyValueBottleneck(2, 128, D, 1, topk=2, process_group=False) for _ in range(2))
            alone.keys = there.keys = keys
            wanted = alone.eval()(x[:, 0], return_values_only=False)
            found = parallelize(there, mesh(4), pairs="table").eval()(x[:, 0], return_values_only=False)
            assert torch.equal(found.indices, wanted.indices), (data.__name__, D)
            assert torch.equal(found.distances, wanted.distances), (data.__name__, D)


def test_near_ties_are_told_apart_as_in_one_process(processes):
    processes(4, _near_ties)


def _wrapped():
    """A whole model, flags of the first process, and batches alone."""
    torch.manual_seed(0)
    models = [kvb.DiscreteKeyValueBottleneck(12, num_memories=8, num_memory_codebooks=4, dim_memory=5) for _ in "12"]
    models[1].load_state_dict(models[0].state_dict())
    models[0].bottleneck.process_group = False
    if dist.get_rank() == 0:
        models[1].freeze_keys()
    models[0].freeze_keys()
    parallelize(models[1], mesh(4), codebooks="table")
    assert models[1].keys_frozen
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    near(models[1](x), models[0](x), "memories")
    codes = [model.encode_dataset(x.split(8), progress=False).codes for model in models]
    assert torch.equal(*codes)
    table = kvb.KeyValueBottleneck(4, 8, 3, 5, process_group=False)
    alone = kvb.KeyValueBottleneck(4, 8, 3, 5, process_group=False)
    parallelize(table, mesh(4), data="table")
    alone.load_state_dict({name: whole(tensor) for name, tensor in table.state_dict().items()})
    batches = [torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    table(batches[dist.get_rank()], pool="mean").square().mean().backward()
    alone(torch.cat(batches), pool="mean").square().mean().backward()
    same_state(table, alone, "data")
    near(whole(table.values.grad), alone.values.grad, "data")


def test_models_and_batches(processes):
    processes(4, _wrapped)


def _sampled():
    there = kvb.KeyValueBottleneck(4, 16, 2, 3, sample_codebook_temperature=5.0)
    there.keys = there.keys[:1].expand(4, -1, -1).clone()
    parallelize(there, mesh(2), codebooks="table")
    torch.manual_seed(3)
    return there.eval().encode(torch.zeros(200, 4, 2))


def test_processes_draw_apart(processes):
    """Equal codebooks, the same seed: the draws of one process are no copy of another's."""
    one, other = processes(2, _sampled)
    assert torch.equal(one, other)
    assert 0.02 < (one[:, 0] == one[:, 2]).float().mean() < 0.4


def _unlearned(split):
    case = (CASES if split == "codebooks" else GIANT)[0]
    alone, there = (each.freeze_keys().eval() for each in pair(case, (4,), **{split: "table"}))
    x = queries(case)
    counts = [kvb.unlearning.hits(each, x) for each in (alone, there)]
    assert torch.equal(*counts)
    for each in (alone, there):
        kvb.unlearning.erase(each, counts[0] == 0)
    same_state(there, alone, "erased")
    with pytest.raises(NotImplementedError, match="call bottleneck.mask_pairs"):
        kvb.unlearning.forget(there, counts[0] == 0)


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_pairs_are_erased_in_their_process(processes, split):
    processes(4, _unlearned, split)


# --- training ---------------------------------------------------------------------------------------------------------


def _trained(split, begin):
    """Gradients, plain steps, fused steps, moving keys and counted hits."""
    for number, case in list(enumerate(CASES if split == "codebooks" else GIANT))[begin : begin + 11]:
        alone, there = pair(case, (4,), **{split: "table"})
        x, what = queries(case), f"case {number}"
        for step in range(3):  # keys move
            near(there(x + step).distances, alone(x + step).distances, f"{what}, step {step}", scale=30)
            same_state(there, alone, f"{what}, step {step}")
        for module in (alone, there):
            module.freeze_keys()
            module(x)
        same_state(there, alone, f"{what}, counted")
        near(there.fraction_of_unused_keys(), alone.fraction_of_unused_keys(), what)
        near(there.perplexity(), alone.perplexity(), what, scale=10)
        if case.options.get("sparse_grad"):
            continue
        codes = alone.encode(x)
        weight = torch.linspace(-1, 2, case.V, dtype=case.dtype)
        for module in (alone, there):
            voted = module.decode(codes, "mean") + module.eval()(x, return_values_only=True).mean(1)
            (voted * weight).sum().backward()
        near(whole(there.values.grad), alone.values.grad, f"{what}, gradient", scale=case.B + 1)
        for module in (alone, there):
            torch.nn.utils.clip_grad_norm_([module.values], 1.0)
            torch.optim.SGD([module.values], lr=0.3).step()
        near(whole(there.values), alone.values, f"{what}, stepped", scale=4)
        if case.V > 1 and case.options.get("topk", 1) == 1:
            _stepped(case, alone, there, codes, what)


def _stepped(case, alone, there, codes, what):
    targets = torch.arange(case.B) % case.V
    for _ in range(3):
        options = {
            "max_norm": 0.5,
            "mask": torch.arange(case.B * math.prod(case.shape)).view(case.B, *case.shape) % 3 > 0,
        }
        wanted = sgd_step(alone.values, codes, targets, **options)
        found = sgd_step(there.values, codes, targets, **options)
        for name in ("loss", "norm", "logits"):
            one, other = (getattr(step, name).to(alone.values.dtype) for step in (found, wanted))
            near(one, other, f"{what}, {name}", scale=10)
        near(whole(there.values), alone.values, f"{what}, fused step", scale=10)


@pytest.mark.parametrize("begin", HALVES)
@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_training_is_that_of_one_process(processes, split, begin):
    processes(4, _trained, split, begin)


# --- (data, table) ----------------------------------------------------------------------------------------------------


def _two_ways(split, number, options):
    """Two batches of unequal size, each split over two processes; one process has their union."""
    case = (CASES if split == "codebooks" else GIANT)[number]
    case = case._replace(options={**case.options, **options, "return_values_only": True})
    alone, there = pair(case, (2, 2), data="data", **{split: "table"})
    x, here = queries(case), dist.get_rank() // 2
    cut = len(x) // 2
    mine = x[:cut] if here == 0 else x[cut : 2 * cut]
    for step in range(3):
        alone(x[: 2 * cut] + step)
        there(mine + step)
        same_state(there, alone, f"step {step}")
    for module, batch in ((alone, x[: 2 * cut]), (there, mine)):
        module.freeze_keys()
        module(batch)
        (module.decode(module.encode(batch), "mean") * torch.linspace(-1, 2, case.V)).sum(-1).mean().backward()
    same_state(there, alone, "counted")
    gradient = exchange.part_of(there.values.grad)
    part = there._layout.part(alone.values.grad.to_dense() if alone.values.grad.is_sparse else alone.values.grad)
    near(gradient.to_dense() if gradient.is_sparse else gradient, part, "gradient")
    codes, targets = alone.encode(x), torch.arange(case.B) % case.V
    own = slice(0, 3) if here == 0 else slice(3, None)
    for _ in range(3):
        wanted = sgd_step(alone.values, codes, targets, max_norm=0.1)
        found = sgd_step(there.values, codes[own], targets[own], max_norm=0.1)
        near(found.logits, wanted.logits[own], "logits", scale=10)
        near(torch.stack(found[:2]), torch.stack(wanted[:2]), "loss and norm", scale=10)
        near(whole(there.values), alone.values, "fused step", scale=10)


@pytest.mark.parametrize(
    ("split", "number", "options"),
    [
        ("codebooks", 2, {}),
        ("codebooks", 6, {"sparse_grad": True}),
        ("pairs", 2, {}),
        ("pairs", 21, {"sparse_grad": True}),
    ],
)
def test_data_parallel_and_split(processes, split, number, options):
    processes(4, _two_ways, split, number, options)


def _rowwise(split, sizes):
    """Sparse gradients of split tables with the row-wise optimizers: as dense ones in one process."""
    case = (CASES if split == "codebooks" else GIANT)[21]._replace(options={"return_values_only": True})
    ways = {split: "table"} if len(sizes) == 1 else {split: "table", "data": "data"}
    for kind in (RowwiseSGD, RowwiseAdam, RowwiseAdagrad):
        alone, there = (each.freeze_keys() for each in pair(case, sizes, **ways))
        there.sparse_grad = True
        optimizers = [kind([each.values], lr=0.3, weight_decay=0.1) for each in (alone, there)]
        for step in range(3):
            norms = []
            for module, optimizer in zip((alone, there), optimizers, strict=True):
                optimizer.zero_grad()
                for part in queries(case, seed=step).split(40):  # gradients add up
                    module(part, pool="sum", mask=part[:, 0, 0] > -2).square().sum().backward()
                norms.append(clip_grad_norm_([module.values], 3.0))
                optimizer.step()
            near(norms[1], norms[0], f"{kind.__name__}, norm", scale=100)
            near(whole(there.values), alone.values, f"{kind.__name__}, step {step}", scale=20)
        assert exchange.part_of(there.values.grad).is_sparse
        for name, kept in optimizers[0].state[alone.values].items():
            near(whole(optimizers[1].state[there.values][name]).float(), kept.float(), name, scale=20)


@pytest.mark.parametrize(("split", "sizes"), [("codebooks", (4,)), ("pairs", (4,)), ("pairs", (2, 2))])
def test_sparse_gradients_and_row_wise_optimizers(processes, split, sizes):
    processes(4, _rowwise, split, sizes)


def _dead_codes_and_first_batches():
    case = CASES[0]._replace(B=64, options={"threshold_ema_dead_code": 0.9, "init_mode": "kmeans", "kmeans_iters": 2})
    _, there = pair(case, (2, 2), data="data", codebooks="table")
    there.initted.zero_()
    for step in range(3):
        there(queries(case, seed=dist.get_rank() // 2 + 10 * step))
    report = there.init_keys(queries(case, seed=dist.get_rank() // 2), "kmeans++", progress=False)
    return [there.keys, there.keys_avg, there.cluster_size], report


def test_replicas_of_a_part_stay_the_same(processes):
    """Where keys are drawn at random: for dead pairs, and as seeds."""
    found = processes(4, _dead_codes_and_first_batches)
    for one, other in ((0, 2), (1, 3)):
        for mine, theirs in zip(found[one][0], found[other][0], strict=True):
            assert torch.equal(mine, theirs)
        assert found[one][1] == found[other][1]
        assert found[one][1].rows == 128
    assert not torch.equal(found[0][0][0], found[1][0][0])


def _differentiated(split):
    """Gradients for the queries, which every process has alike."""
    case = (CASES if split == "codebooks" else GIANT)[10]
    alone, there = (each.eval() for each in pair(case, (4,), **{split: "table"}))
    grads = []
    for module in (alone, there):
        x = (queries(case) + 0.25).requires_grad_()
        (module(x).distances * torch.arange(1.0, 13.0)[:, None, None, None]).sum().backward()
        grads.append(x.grad)
    near(grads[1], grads[0], "gradient of queries", scale=50)


@pytest.mark.parametrize("split", ["codebooks", "pairs"])
def test_queries_learn_through_distances(processes, split):
    processes(4, _differentiated, split)
