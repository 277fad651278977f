"""Splitters: shapes, definition, views, errors."""

from __future__ import annotations

import pytest
import torch

from kvb import KeyValueBottleneck, splitters
from kvb.splitters import Chunk, LearnedProjection, RandomProjection, SparseProjection


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (2, 3, 4), (0,)])
def test_any_shape(shape):
    x = torch.randn(3, *shape, 12)
    chunked = Chunk(12, 4)(x)
    assert chunked.shape == (3, 4, *shape, 3)
    assert torch.equal(chunked.movedim(1, -2).flatten(-2), x)
    for projection in (RandomProjection(12, 4, 5), SparseProjection(12, 4, 5)):
        want = torch.einsum("b...d,cdk->bc...k", x, projection.rand_proj)
        torch.testing.assert_close(projection(x), want)
    learned = LearnedProjection(12, 4, 5)
    want = torch.einsum("b...d,kcd->bc...k", x, learned.proj.weight.view(5, 4, 12))
    torch.testing.assert_close(learned(x), want)


def test_chunk_is_a_view():
    x = torch.randn(3, 7, 12)
    assert Chunk(12, 4)(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("kind", [RandomProjection, SparseProjection])
def test_projection_columns_have_unit_norm_and_never_learn(kind):
    projection = kind(30, 4, 5)
    torch.testing.assert_close(projection.rand_proj.norm(dim=1), torch.ones(4, 5))
    assert list(projection.parameters()) == []
    assert list(projection.state_dict()) == ["rand_proj"]
    again = [kind(30, 4, 5, generator=torch.Generator().manual_seed(3)).rand_proj for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(("channels", "entries"), [(1, 1), (2, 1), (30, 5), (1024, 32)])
def test_sparse_columns(channels, entries):
    matrix = SparseProjection(channels, 8, 16).rand_proj
    assert (matrix != 0).sum(1).unique().tolist() == [entries]
    torch.testing.assert_close(matrix.abs().amax(1), torch.full((8, 16), entries**-0.5))
    assert channels == 1 or len((matrix != 0).sum((0, 2)).unique()) > 1  # places are drawn
    assert matrix.sign().mean().abs() < 0.5  # and so are signs


def test_sparse_projections_keep_distances():
    a, b = torch.randn(2, 50, 1024)
    projection = SparseProjection(1024, 64, 8)
    kept = (projection(a) - projection(b)).square().sum((1, 2)) / (64 * 8)
    torch.testing.assert_close(kept, (a - b).square().sum(1) / 1024, rtol=0.3, atol=0)


def test_the_learned_projection_learns_from_distances():
    features, learned = torch.randn(20, 12), LearnedProjection(12, 4, 5)
    bottleneck = KeyValueBottleneck(4, 8, 5, 3, return_values_only=False).freeze_keys()
    output = bottleneck(learned(features))
    output.values.sum().backward(retain_graph=True)
    assert learned.proj.weight.grad is None
    output.distances.sum().backward()
    assert learned.proj.weight.grad.abs().sum() > 0
    assert list(learned.state_dict()) == ["proj.weight"]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert learned(features.to(dtype)).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("chunk", Chunk),
        ("random_projection", RandomProjection),
        ("sparse_projection", SparseProjection),
        ("learned_projection", LearnedProjection),
    ],
)
def test_every_mode_has_its_splitter(mode, kind):
    splitter = splitters.make(mode, 12, 4, 3)
    assert type(splitter) is kind
    assert splitter(torch.randn(2, 7, 12)).shape == (2, 4, 7, 3)


def test_modes_are_checked():
    with pytest.raises(ValueError, match=r"splitting_mode must be one of 'chunk', .*; got 'sparse'"):
        splitters.make("sparse", 12, 4, 3)
    with pytest.raises(ValueError, match=r"dim_keys must be num_channels / num_codebooks = 12 / 4 = 3 .*, got 5"):
        splitters.make("chunk", 12, 4, 5)


def test_projections_are_float32_or_float64_and_pass_gradients():
    projection = RandomProjection(12, 4, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert projection(torch.randn(3, 12, dtype=dtype)).dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(3, 12, requires_grad=True)
    projection(x).sum().backward()
    torch.testing.assert_close(x.grad, projection.rand_proj.sum((0, 2)).expand(3, -1))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"num_channels \(10\) must be divisible by num_codebooks \(4\)"):
        Chunk(10, 4)
    with pytest.raises(ValueError, match="dim_keys must be a positive integer, got 0"):
        RandomProjection(12, 4, 0)
    for splitter in (Chunk(12, 4), RandomProjection(12, 4, 5), SparseProjection(12, 4, 5), LearnedProjection(12, 4, 5)):
        with pytest.raises(ValueError, match=r"expected x of shape .* = \(B, \*shape, 12\), got \(3, 10\)"):
            splitter(torch.randn(3, 10))
        with pytest.raises(ValueError, match="expected x of shape"):
            splitter(torch.randn(12))
        with pytest.raises(TypeError, match="expected a floating-point x"):
            splitter(torch.ones(3, 12, dtype=torch.int64))
        with pytest.raises(TypeError, match="argument 'x' must be Tensor, not list"):
            splitter([[1.0] * 12])
    for kind in (RandomProjection, LearnedProjection):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            kind(12, 4, 5)(torch.empty(3, 12, device="meta"))


def test_repr_names_the_sizes():
    assert repr(Chunk(12, 4)) == "Chunk(12 channels -> 4 heads of 3)"
    assert repr(RandomProjection(12, 4, 5)) == "RandomProjection(12 channels -> 4 heads of 5)"
    assert repr(SparseProjection(12, 4, 5)) == "SparseProjection(12 channels -> 4 heads of 5)"
    assert "12 channels -> 4 heads of 5" in repr(LearnedProjection(12, 4, 5))
