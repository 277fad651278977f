"""Packed keys of other keys, and damaged ones: never a wrong answer without a word, never a crash."""

from __future__ import annotations

import itertools

import pytest
import torch
from packed_damage import damaged

from kvb import functional, ops

pytestmark = [pytest.mark.fallback, pytest.mark.memory]

op = torch.ops.kvb
CPP = ops.backend("cpu") == "cpp"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def problem(C=2, K=20, D=5, dtype=torch.float32, n=30):
    return torch.randn(n, 1, C, D).to(dtype), torch.randn(C, K, D).to(dtype)


# --- packed_matches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (1, 40, 33), (3, 200, 14)])
def test_keys_match_their_own_packed_form_only(sizes, dtype):
    _, keys = problem(*sizes, dtype=dtype)
    packed = op.pack_keys(keys)
    assert op.packed_matches(keys, packed)
    assert op.packed_matches(keys.clone(), packed)
    assert op.packed_matches(keys.transpose(0, 1).contiguous().transpose(0, 1), packed)
    assert not op.packed_matches(torch.randn(sizes).to(dtype), packed)
    assert not op.packed_matches(keys[:, :, :-1].contiguous(), packed) if sizes[-1] > 1 else True
    assert not op.packed_matches(torch.cat([keys, keys]), packed)
    other = {torch.float32: torch.float64}.get(dtype, torch.float32)
    if {dtype, other} & {torch.float64}:
        assert not op.packed_matches(keys.to(other), packed)


@pytest.mark.skipif(not CPP, reason="plain PyTorch packs values: bits that change none of them are no change")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (1, 20, 14)])
def test_every_single_bit_matters(sizes, dtype):
    _, keys = problem(*sizes, dtype=dtype)
    packed, bits = op.pack_keys(keys), keys.element_size() * 8
    for place, bit in itertools.product(range(keys.numel()), range(bits)):
        other = keys.clone()
        flip = torch.tensor(1, dtype=torch.int64) << bit
        other.view(-1).view(INTEGER[keys.element_size()])[place] ^= flip.to(INTEGER[keys.element_size()])
        assert not op.packed_matches(other, packed), (place, bit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_moves_or_repeats_numbers_matters(dtype):
    _, keys = problem(2, 64, 16, dtype=dtype)
    packed = op.pack_keys(keys)
    swaps = [keys.flip(0), keys.flip(1), keys.flip(2), keys.roll(1, 1), keys.roll(1, 2), keys.roll(8, 1), -keys]
    for a, b in itertools.combinations(range(0, 64, 7), 2):
        swaps.append(keys.clone())
        swaps[-1][:, [a, b]] = keys[:, [b, a]]
        swaps.append(keys.clone())
        swaps[-1][:, [a, b]] *= -1  # two signs in one lane of a fingerprint
        swaps.append(keys.clone())
        swaps[-1][0, [a, b]] = 0
    assert not any(op.packed_matches(other, packed) for other in swaps)


@pytest.mark.skipif(not CPP, reason="plain PyTorch compares bytes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sign_of_zero_is_irrelevant(dtype):
    _, keys = problem(2, 33, 7, dtype=dtype)
    keys[torch.rand(keys.shape) < 0.3] = 0
    packed = op.pack_keys(keys)
    assert op.packed_matches(torch.where(keys == 0, -keys, keys), packed)


@pytest.mark.slow
@pytest.mark.skipif(not CPP, reason="a fingerprint of the C++ backend")
def test_no_two_changes_cancel():
    """Pairs of changed signs, low bits and whole numbers, near and far from each other."""
    _, keys = problem(1, 256, 16)
    packed, whole = op.pack_keys(keys), keys.view(-1).view(torch.int32)
    changes = torch.tensor([-(1 << 31), 1, 1 << 22, 1 << 23, 0x5555], dtype=torch.int32)
    for _ in range(20_000):
        other = whole.clone()
        places = torch.randperm(4096)[:2]
        other[places] ^= changes[torch.randint(len(changes), (2,))]
        assert not op.packed_matches(other.view(torch.float32).view_as(keys), packed)


# --- the front door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("topk", [1, 3])
def test_packed_keys_of_other_keys_raise(dtype, topk):
    for _ in range(20):
        queries, keys = problem(dtype=dtype)
        other = keys.clone()
        other[0, 3] += 1
        for call in (
            lambda q, k, p: functional.nearest(q, k, packed=p, topk=topk),
            lambda q, k, p: functional.lookup(q, k, torch.randn(2, 20, 3), packed=p),
        ):
            call(queries, keys, op.pack_keys(keys))
            with pytest.raises(RuntimeError, match="packed keys do not match keys.*pack_keys"):
                call(queries, keys, op.pack_keys(other))


def test_packed_keys_of_other_sizes_or_kinds_raise():
    queries, keys = problem()
    for packed in (op.pack_keys(keys[:, :-1]), op.pack_keys(keys.double()), torch.zeros(2, 64, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="packed keys do not match keys"):
            functional.nearest(queries, keys, packed=packed)
    with pytest.raises(TypeError, match="packed"):
        functional.nearest(queries, keys, packed=[1])


def test_a_compiled_graph_checks_as_well():
    queries, keys = problem()
    packed = op.pack_keys(keys)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def search(queries, keys, packed):
        return functional.nearest(queries, keys, packed=packed)[0]

    assert torch.equal(search(queries, keys, packed), functional.nearest(queries, keys)[0])
    with pytest.raises(RuntimeError, match="packed keys do not match keys"):
        search(queries, keys + 1, packed)


# --- the operator, which does not read all keys -----------------------------------------------------------------------


@pytest.mark.skipif(not CPP, reason="a check of the C++ backend")
@pytest.mark.parametrize("D", [3, 14, 600])
@pytest.mark.parametrize("K", [50, 200])
@pytest.mark.parametrize("topk", [1, 3])
def test_a_winner_that_moved_is_noticed(D, K, topk):
    """Unless the search reads few keys as they lie: then they are found where they are now."""
    queries, keys = problem(2, K, D, n=200)
    packed = op.pack_keys(keys)
    op.nearest(queries, keys, packed, None, topk)
    for moved in (keys + 1, keys * 1.01, keys.flip(1), keys.flip(0)):
        moved = moved.contiguous()
        error = ""
        try:
            found = op.nearest(queries, moved, packed, None, topk)
        except RuntimeError as raised:
            error = str(raised)
        if error:
            assert "packed keys do not fit the keys" in error
        else:
            assert K == 50
            expected = op.nearest(queries, moved, ops.kept.unpacked(moved), None, topk)
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sizes", [(2, 20, 5), (1, 300, 14), (1, 17, 3), (1, 150, 3), (1, 40, 520)])
def test_damaged_packed_keys_never_name_a_key_that_is_not_there(sizes, dtype):
    """Each operator may raise; what it returns are indices of keys."""
    queries, keys = problem(*sizes, dtype=dtype)
    K, mask = sizes[1], torch.rand(sizes[:2]) < 0.5
    for packed, topk, masked in itertools.product(damaged(op.pack_keys(keys), 40), (1, min(5, K)), (None, mask)):
        try:
            indices, _ = op.nearest(queries, keys, packed, masked, topk)
        except RuntimeError as raised:
            error = str(raised)
        else:
            error = "packed keys do not show it"
            assert ((indices >= 0) & (indices < K)).all()
        assert "packed keys do not" in error  # match, or fit


# --- keys that were not packed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 20, 5), (3, 40, 1), (1, 300, 14), (2, 17, 33), (2, 33, 8)])
def test_keys_that_were_not_packed_are_searched_all_the_same(sizes, dtype):
    """Few queries read them as they lie; for more of them the operator packs."""
    C, K, _ = sizes
    queries, keys = problem(*sizes, dtype=dtype, n=40)
    queries[3, 0, 0, 0], keys[0, 2], keys[-1, 5] = torch.nan, torch.inf, keys[-1, 6]
    packed, mask = op.pack_keys(keys), torch.rand(C, K) < 0.8
    for (n, topk), allowed in itertools.product([(1, 1), (16, 3), (16, K), (17, 2), (40, 1)], (None, mask)):
        some = queries[:n]
        want = op.nearest(some, keys, packed, allowed, topk)
        got = op.nearest(some, keys, ops.kept.unpacked(keys), allowed, topk)
        assert torch.equal(got[0], want[0]), (n, topk)
        assert torch.equal(got[1].nan_to_num(-1), want[1].nan_to_num(-1)), (n, topk)


def test_nothing_passes_for_the_packed_form_of_keys():
    """What stands for keys that were not packed is no packed form."""
    queries, keys = problem()
    nothing = ops.kept.unpacked(keys)
    assert not op.packed_matches(keys, nothing)
    with pytest.raises(RuntimeError, match="packed keys do not match"):
        functional.nearest(queries, keys, packed=nothing)


def test_unpacked_keys_under_transforms():
    queries, keys = problem(n=4)
    many = torch.stack([keys, keys.flip(1)])
    got = torch.func.vmap(lambda k: functional.nearest(queries, k)[0])(many)
    want = torch.stack([functional.nearest(queries, k, packed=functional.pack_keys(k))[0] for k in many])
    assert torch.equal(got, want)
    values = torch.randn(2, 20, 3, requires_grad=True)
    out, codes = functional.lookup(queries, keys, values)
    (grad,) = torch.autograd.grad(out.sum(), values)
    assert grad.sum() == out.numel()
    assert torch.equal(codes, functional.nearest(queries, keys)[0])
