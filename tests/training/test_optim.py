"""Row-wise optimizers: what they move, and what they never move."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kvb import BottleneckedEncoder, KeyValueBottleneck
from kvb.optim import RowwiseAdagrad, RowwiseAdam, RowwiseSGD, audit, clip_grad_norm_, param_groups

# Each with the optimizer of torch that it must be for a row that has a gradient in every step.
PEERS = {
    "sgd": (RowwiseSGD, torch.optim.SGD, {"lr": 0.3}),
    "sgd, decay": (RowwiseSGD, torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1}),
    "adagrad": (RowwiseAdagrad, torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6}),
    "adam": (RowwiseAdam, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}),
    "adam, decay": (RowwiseAdam, torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}),
}
OURS = {
    "sgd": (RowwiseSGD, {"weight_decay": 0.01}),
    "adagrad": (RowwiseAdagrad, {"weight_decay": 0.01}),
    "adam": (RowwiseAdam, {"weight_decay": 0.01}),
    "sgd, no decay": (RowwiseSGD, {}),
    "adagrad, no decay": (RowwiseAdagrad, {}),
    "adam, no decay": (RowwiseAdam, {}),
}
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


def sparse(dense):
    """Rows that are not zero, as sparse_grad gives them."""
    return dense.to_sparse(2)


def table_of(C=2, K=3, V=2, dtype=torch.float32):
    return nn.Parameter(torch.arange(C * K * V, dtype=dtype).view(C, K, V))


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sgd_moves_touched_rows_only(kind, dtype):
    table = table_of(dtype=dtype)
    dense = torch.zeros(2, 3, 2, dtype=dtype)
    dense[0, 1], dense[1, 2] = torch.tensor([2, -4], dtype=dtype), torch.tensor([0, 8], dtype=dtype)
    places = torch.tensor([[1, 0, 1], [2, 1, 2]])
    rows = torch.tensor([[0, 6], [2, -4], [0, 2]], dtype=dtype)
    repeated = torch.sparse_coo_tensor(places, rows, table.shape, check_invariants=False)
    table.grad = {"dense": dense, "sparse": sparse(dense), "repeated": repeated}[kind]
    RowwiseSGD([table], lr=0.5, weight_decay=0.5).step()
    want = [[[0, 1], [2 * 0.75 - 1, 3 * 0.75 + 2], [4, 5]], [[6, 7], [8, 9], [7.5, 11 * 0.75 - 4]]]
    assert table.tolist() == want


def test_adam_counts_the_steps_of_every_row():
    """Under the same gradient every step is lr long, whenever a row's first one comes."""
    table = nn.Parameter(torch.zeros(1, 3, 1))
    optimizer = RowwiseAdam([table], lr=0.5)
    for row, grad in ((0, 1.0), (0, 1.0), (0, 1.0), (2, -100.0)):
        table.grad = torch.zeros(1, 3, 1)
        table.grad[0, row] = grad
        optimizer.step()
    assert optimizer.state[table]["step"].flatten().tolist() == [3, 0, 1]
    torch.testing.assert_close(table.flatten(), torch.tensor([-1.5, 0.0, 0.5]), rtol=1e-6, atol=0)


def test_adagrad_sums_the_squares_of_touched_rows():
    table = nn.Parameter(torch.zeros(1, 2, 2))
    optimizer = RowwiseAdagrad([table], lr=1.0)
    for grad in ([3.0, 4.0], [4.0, 0.0]):
        table.grad = torch.tensor([[[0.0, 0.0], grad]])
        optimizer.step()
    assert optimizer.state[table]["sum"].tolist() == [[[0, 0], [25, 16]]]
    torch.testing.assert_close(table[0, 1], torch.tensor([-1.8, -1.0]), rtol=1e-6, atol=0)


# --- against torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("rowwise", [True, False, None])
@pytest.mark.parametrize("shape", [(4, 5, 3), (6, 5), (7,)])
def test_with_a_gradient_everywhere_they_are_torchs_own(name, rowwise, shape):
    ours, theirs, options = PEERS[name]
    params = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    optimizers = ours([params[0]], rowwise=rowwise, **options), theirs([params[1]], **options)
    for _ in range(10):
        grad = torch.randn(shape)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], **CLOSE)


@pytest.mark.parametrize("name", PEERS)
def test_a_row_sees_the_optimizer_that_steps_with_it(name):
    """Rows touched at random: each is a parameter of its own for torch's optimizer."""
    ours, theirs, options = PEERS[name]
    table = nn.Parameter(torch.ones(2, 4, 3))
    rows = [nn.Parameter(torch.ones(3)) for _ in range(8)]
    optimizer, others = ours([table], **options), [theirs([row], **options) for row in rows]
    for _ in range(30):
        touched = torch.rand(8) < 0.4
        grad = torch.randn(8, 3) * touched[:, None]
        table.grad = grad.view(2, 4, 3)
        optimizer.step()
        for row in touched.nonzero()[:, 0].tolist():
            rows[row].grad = grad[row].clone()
            others[row].step()
    torch.testing.assert_close(table.detach().view(8, 3), torch.stack(rows).detach(), **CLOSE)


@pytest.mark.parametrize("name", OURS)
def test_dense_and_sparse_gradients_give_the_same_bits(name):
    kind, options = OURS[name]
    tables = [nn.Parameter(torch.ones(3, 7, 4)) for _ in range(2)]
    optimizers = [kind([table], **options) for table in tables]
    for step in range(12):
        dense = torch.randn(3, 7, 4) * (torch.rand(3, 7, 1) < 0.3)
        if step == 4:
            dense.zero_()
        listed = sparse(dense)
        if step == 7:  # a listed row of zeros is no gradient, as in the dense table
            listed.values()[0] = 0
            dense = listed.to_dense()
        for table, optimizer, grad in zip(tables, optimizers, (dense, listed), strict=True):
            table.grad = grad
            optimizer.step()
    assert torch.equal(*tables)
    for key, kept in optimizers[0].state[tables[0]].items():
        assert torch.equal(kept, optimizers[1].state[tables[1]][key])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("is_sparse", [True, False])
def test_rows_of_the_first_task_stay_bitwise_through_200_steps_of_the_second(name, is_sparse):
    """Rows 0 to 99 learn for 20 steps, rows 100 to 199 for 200, rows 200 to 299 never."""
    kind, options = OURS[name]
    module = KeyValueBottleneck(2, 300, 3, 4, sparse_grad=is_sparse).freeze_keys()
    optimizer = kind(module.parameters(), **options)
    start = module.values.detach().clone()

    def train(low, high, steps):
        for _ in range(steps):
            codes = torch.randint(low, high, (16, 2))
            optimizer.zero_grad()
            (module.decode(codes, "mean") - 1).square().sum().backward()
            clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()

    train(0, 100, 20)
    learned = module.values.detach().clone()
    state = {key: kept.clone() for key, kept in optimizer.state[module.values].items()}
    train(100, 200, 200)
    assert not torch.equal(learned[:, :100], start[:, :100])
    assert not torch.equal(module.values[:, 100:200], start[:, 100:200])
    assert torch.equal(module.values[:, :100], learned[:, :100])
    assert torch.equal(module.values[:, 200:], start[:, 200:])
    for key, kept in optimizer.state[module.values].items():
        assert torch.equal(kept[:, :100], state[key][:, :100])


# --- one optimizer for a whole model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("is_sparse", [True, False])
def test_tables_and_ordinary_parameters_in_one_optimizer(name, is_sparse):
    ours, theirs, options = PEERS[name]
    module = KeyValueBottleneck(2, 9, 3, 4, sparse_grad=is_sparse).freeze_keys()
    model = nn.ModuleDict({"memory": module, "head": nn.Linear(4, 3), "unused": nn.Linear(1, 1)})
    twin = copy.deepcopy(model["head"])
    optimizer = ours(param_groups(model, lr=options["lr"], values_lr=0.2))
    other = theirs(twin.parameters(), **options | {"lr": options["lr"]} if name != "adagrad" else {"lr": 0.1})
    codes = torch.randint(5, (6, 2))
    for _ in range(5):
        inputs = module.decode(codes, "mean")
        loss = model["head"](inputs).square().sum()
        optimizer.zero_grad()
        other.zero_grad()
        loss.backward()
        twin(inputs.detach()).square().sum().backward()
        optimizer.step()
        other.step()
    torch.testing.assert_close(model["head"].weight, twin.weight, **CLOSE)
    torch.testing.assert_close(model["head"].bias, twin.bias, **CLOSE)
    assert optimizer.param_groups[1]["lr"] == 0.2


def test_param_groups_separate_tables_from_the_rest():
    model = BottleneckedEncoder(nn.Linear(3, 6), 6, 2, 5, 3, 4)
    rest, tables = param_groups(model, lr=1e-3, values_lr=0.3)
    assert [id(p) for p in tables["params"]] == [id(model.bottleneck.values)]
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.encoder.parameters()}
    assert (rest["lr"], tables["lr"]) == (1e-3, 0.3)
    assert (tables["rowwise"], tables["weight_decay"], tables["momentum"]) == (True, 0.0, 0.0)
    model.freeze_encoder()
    (alone,) = param_groups(model, lr=0.5)
    assert alone["lr"] == 0.5
    assert audit(torch.optim.SGD(param_groups(model, 0.1), momentum=0.9, weight_decay=0.1), model) == []
    with pytest.raises(ValueError, match="got Linear without one"):
        param_groups(nn.Linear(2, 2), 0.1)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        param_groups([], 0.1)
    with pytest.raises(ValueError, match=r"values_lr must be in \[0.0, inf\), got -1"):
        param_groups(model, 0.1, -1)


@pytest.mark.parametrize("name", OURS)
def test_an_optimizer_goes_on_where_it_was_saved(name):
    kind, options = OURS[name]
    tables = [nn.Parameter(torch.ones(2, 5, 3)), nn.Parameter(torch.ones(3))]
    optimizer = kind(tables, **options)

    def train(params, trained, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            for param in params:
                touched = torch.rand(*param.shape[:-1], 1, generator=generator) < 0.5
                param.grad = torch.randn(param.shape, generator=generator) * touched
            trained.step()

    train(tables, optimizer, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copies = [nn.Parameter(table.detach().clone()) for table in tables]
    again = kind(copies, lr=7.0)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(tables, optimizer, 1)
    train(copies, again, 1)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert all(torch.equal(a, b) for a, b in zip(tables, copies, strict=True))


def test_state_of_half_precision_tables_keeps_its_step_counts():
    table = nn.Parameter(torch.ones(1, 4, 2, dtype=torch.bfloat16))
    optimizer = RowwiseAdam([table])
    for _ in range(300):
        table.grad = torch.ones_like(table)
        optimizer.step()
    again = RowwiseAdam([table])
    again.load_state_dict(optimizer.state_dict())
    assert again.state[table]["step"].flatten().tolist() == [300] * 4


def test_a_closure_and_a_schedule_work():
    table = table_of()
    optimizer = RowwiseSGD([table], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = table[0, 0].sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1
    schedule.step()
    optimizer.step(closure)
    assert table[0, 0].tolist() == [-1.5, -0.5]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_gradients_are_dropped_or_zeroed(is_sparse):
    table = nn.Parameter(torch.ones(2, 3, 4))
    plain = nn.Parameter(torch.ones(5))
    optimizer = RowwiseSGD([{"params": [table]}, {"params": [plain], "lr": 0.1}])
    for set_to_none in (False, True):
        table.grad = torch.ones(2, 3, 4).to_sparse(2) if is_sparse else torch.ones(2, 3, 4)
        plain.grad = torch.ones(5)
        held = plain.grad
        optimizer.zero_grad(set_to_none=set_to_none)
        assert (table.grad is None, plain.grad is None) == (set_to_none, set_to_none)
        assert held.any() == set_to_none
        assert set_to_none or not table.grad.to_dense().any()


def test_embeddings_with_sparse_gradients_move_row_by_row():
    embedding = nn.Embedding(5, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = RowwiseSGD(embedding.parameters(), lr=1.0)
    embedding(torch.tensor([3, 3, 1])).sum().backward()
    optimizer.step()
    torch.testing.assert_close((before - embedding.weight)[:, 0], torch.tensor([0.0, 1, 0, 2, 0]), rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused():
    table = table_of()
    for kind, options, message in (
        (RowwiseSGD, {"lr": -1}, r"lr must be in \[0.0, inf\), got -1"),
        (RowwiseSGD, {"weight_decay": float("nan")}, "weight_decay must be in"),
        (RowwiseAdagrad, {"initial_accumulator_value": -1}, "initial_accumulator_value must be in"),
        (RowwiseAdagrad, {"eps": 0.0}, r"eps must be in \(0.0"),
        (RowwiseAdam, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0.0, 1.0\), got 1.0"),
        (RowwiseAdam, {"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        (RowwiseAdam, {"eps": -1}, "eps must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            kind([table], **options)
        with pytest.raises(ValueError, match=message):
            kind([{"params": [table], **options}])
    with pytest.raises(TypeError, match="rowwise must be True, False or None, got 3"):
        RowwiseSGD([table], rowwise=3)
    table.grad = torch.ones(2, 3, 2).to_sparse(1)
    with pytest.raises(ValueError, match="sparse_dim = 2, got sparse_dim = 1"):
        RowwiseSGD([table]).step()
    strided = nn.Parameter(torch.zeros(2, 3, 4).transpose(0, 1))
    strided.grad = torch.ones(3, 2, 4)
    with pytest.raises(ValueError, match="contiguous table of values"):
        RowwiseSGD([strided]).step()


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs_own_on_the_dense_gradients(norm_type, max_norm):
    dense = [torch.randn(2, 3, 4) * (torch.rand(2, 3, 1) < 0.5), torch.randn(5), torch.randn(2, 2, 3)]
    ours = [nn.Parameter(torch.zeros_like(grad)) for grad in dense]
    theirs = copy.deepcopy(ours)
    for param, grad in zip(theirs, dense, strict=True):
        param.grad = grad.clone()
    ours[0].grad, ours[1].grad = sparse(dense[0]), dense[1].clone()
    half = dense[2].to_sparse(2) * 0.5
    ours[2].grad = half + half  # two uses of a table in one loss
    unused = nn.Parameter(torch.zeros(3))
    got = clip_grad_norm_([*ours, unused], max_norm, norm_type)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(got, want, **CLOSE)
    for mine, other in zip(ours, theirs, strict=True):
        grad = mine.grad.to_dense() if mine.grad.is_sparse else mine.grad
        torch.testing.assert_close(grad, other.grad, **CLOSE)
    assert ours[0].grad.is_coalesced()
    assert unused.grad is None


def test_rows_listed_twice_are_merged_before_the_norm():
    table = nn.Parameter(torch.zeros(1, 3, 1))
    places = torch.tensor([[0, 0, 0], [2, 0, 2]])
    table.grad = torch.sparse_coo_tensor(
        places, torch.tensor([[1.0], [4.0], [2.0]]), table.shape, check_invariants=False
    )
    assert clip_grad_norm_(table, 1.0).item() == 5.0
    torch.testing.assert_close(table.grad.to_dense().flatten(), torch.tensor([0.8, 0.0, 0.6]), rtol=1e-5, atol=0)


def test_clipping_without_gradients_and_with_infinite_ones():
    table = table_of()
    assert clip_grad_norm_([table], 1.0) == 0
    table.grad = sparse(torch.full((2, 3, 2), math.inf))
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_([table], 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_one_sparse_gradient_writes_it_once_its_rows_are_sums(repeated, max_norm):
    places = torch.tensor([[0, 1, 1], [1, 2, 2] if repeated else [1, 0, 2]])
    rows = torch.tensor([[3.0, 4.0], [1.0, 2.0], [1.0, -2.0]])
    table = table_of()
    table.grad = torch.sparse_coo_tensor(places, rows, table.shape, check_invariants=False)
    dense = nn.Parameter(table.detach().clone())
    dense.grad = table.grad.to_dense()
    found = clip_grad_norm_(table, max_norm)
    torch.testing.assert_close(found, nn.utils.clip_grad_norm_(dense, max_norm))
    assert table.grad.is_coalesced()
    torch.testing.assert_close(table.grad.to_dense(), dense.grad)


# --- what PyTorch does around a step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_hooks_and_profilers_see_steps(name):
    optimizer, options = OURS[name]
    table, calls = table_of(), []
    learner = optimizer([table], lr=0.1, **options)

    def step():
        table.grad = torch.ones_like(table)
        learner.step()

    step()
    assert calls == []
    handles = [
        learner.register_step_pre_hook(lambda *_: calls.append("before")),
        learner.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    step()
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        handle = register(lambda *_: calls.append("any"))
        step()
        handle.remove()
    step()
    assert calls == ["before", "after", "any", "any"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    assert f"Optimizer.step#{optimizer.__name__}.step" in {event.key for event in profile.key_averages()}


def test_a_schedule_and_a_subclass_wrap_steps_as_they_do_others():
    class Counting(RowwiseSGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    table = table_of()
    learner = Counting([table], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(learner, 0.5)
    table.grad = torch.ones_like(table)
    before = table.detach().clone()
    learner.step()
    schedule.step()
    learner.step(lambda: None)
    assert learner.steps == 2
    assert torch.equal(before - table, torch.full_like(table, 1.5))
