"""Splitters: shapes, definition, views, errors."""

from __future__ import annotations

import pytest
import torch

from kvb.splitters import Chunk, RandomProjection


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (2, 3, 4), (0,)])
def test_any_shape(shape):
    x = torch.randn(3, *shape, 12)
    chunked = Chunk(12, 4)(x)
    assert chunked.shape == (3, 4, *shape, 3)
    assert torch.equal(chunked.movedim(1, -2).flatten(-2), x)
    projection = RandomProjection(12, 4, 5)
    want = torch.einsum("b...d,cdk->bc...k", x, projection.rand_proj)
    torch.testing.assert_close(projection(x), want)


def test_chunk_is_a_view():
    x = torch.randn(3, 7, 12)
    assert Chunk(12, 4)(x).data_ptr() == x.data_ptr()


def test_projection_columns_have_unit_norm_and_never_learn():
    projection = RandomProjection(30, 4, 5)
    torch.testing.assert_close(projection.rand_proj.norm(dim=1), torch.ones(4, 5))
    assert list(projection.parameters()) == []
    assert list(projection.state_dict()) == ["rand_proj"]
    again = [RandomProjection(30, 4, 5, generator=torch.Generator().manual_seed(3)).rand_proj for _ in range(2)]
    assert torch.equal(*again)


def test_projection_keeps_the_dtype_and_passes_gradients():
    projection = RandomProjection(12, 4, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert projection(torch.randn(3, 12, dtype=dtype)).dtype == dtype
    x = torch.randn(3, 12, requires_grad=True)
    projection(x).sum().backward()
    torch.testing.assert_close(x.grad, projection.rand_proj.sum((0, 2)).expand(3, -1))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"num_channels \(10\) must be divisible by num_codebooks \(4\)"):
        Chunk(10, 4)
    with pytest.raises(ValueError, match="dim_keys must be a positive integer, got 0"):
        RandomProjection(12, 4, 0)
    for splitter in (Chunk(12, 4), RandomProjection(12, 4, 5)):
        with pytest.raises(ValueError, match=r"expected x of shape .* = \(B, \*shape, 12\), got \(3, 10\)"):
            splitter(torch.randn(3, 10))
        with pytest.raises(ValueError, match="expected x of shape"):
            splitter(torch.randn(12))
        with pytest.raises(TypeError, match="expected a floating-point x"):
            splitter(torch.ones(3, 12, dtype=torch.int64))
        with pytest.raises(TypeError, match="argument 'x' must be Tensor, not list"):
            splitter([[1.0] * 12])
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        RandomProjection(12, 4, 5)(torch.empty(3, 12, device="meta"))


def test_repr_names_the_sizes():
    assert repr(Chunk(12, 4)) == "Chunk(12 channels -> 4 heads of 3)"
    assert repr(RandomProjection(12, 4, 5)) == "RandomProjection(12 channels -> 4 heads of 5)"
