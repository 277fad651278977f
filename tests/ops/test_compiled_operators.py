"""Operators in a compiled graph: the same bits and errors as without one, and little Python around each of them."""

from __future__ import annotations

import sys

import pytest
import torch
from operator_calls import PLAIN, arguments

from kvb import functional, ops

op = torch.ops.kvb

PYTHON_CALLS = 3  # at most: that of the operator, the kernel at its Autograd key, the look for tangents


def fetch_and_sum(values, indices, grad):
    fetched = functional.gather(values, indices)
    votes = functional.gather(values, indices, pool="mean")
    return fetched, votes, op.gather_backward(grad, indices, values.shape[1], "sum")


def table():
    return torch.randn(3, 7, 5), torch.randint(7, (4, 2, 3)), torch.randn(4, 2, 5)


@pytest.fixture(scope="module")
def compiled():
    torch._dynamo.reset()
    return torch.compile(fetch_and_sum, fullgraph=True, backend="aot_eager")


def test_a_compiled_graph_fetches_the_same_bits(compiled):
    values, indices, grad = table()
    for found, want in zip(compiled(values, indices, grad), fetch_and_sum(values, indices, grad), strict=True):
        assert torch.equal(found, want)
        assert found.stride() == want.stride()


@pytest.mark.skipif(ops.backend("cpu") == "triton", reason="a GPU asserts on the device")
@pytest.mark.parametrize("bad", [-1, 7, -8, 1 << 40])
def test_a_compiled_graph_names_an_index_out_of_range(compiled, bad):
    values, indices, grad = table()
    indices[2, 1, 1] = bad
    with pytest.raises(IndexError, match=f"index {bad} is out of bounds for codebook with 7 pairs"):
        compiled(values, indices, grad)


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="other backends are Python")
@pytest.mark.parametrize("name", ["nearest", "gather", "gather_backward", "gather_backward_rows", "lookup"])
def test_an_operator_without_gradients_is_little_python(name):
    """A graph calls its operators from the top, one by one, with gradients off."""
    given, calls = arguments(PLAIN)[name], []

    def watch(frame, event, _):
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    operator = getattr(op, name).default
    with torch.no_grad():
        operator(*given)
        sys.setprofile(watch)
        try:
            operator(*given)
        finally:
            sys.setprofile(None)
    assert 0 < len(calls) <= PYTHON_CALLS, calls
