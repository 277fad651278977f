"""The replica of ``VectorQuantize``: masks, frozen calls, codes back from indices."""

from __future__ import annotations

import pytest
import torch

from kvb.compat.quantize import VectorQuantize

pytestmark = pytest.mark.fallback


def make(**options):
    return VectorQuantize(6, 9, **{"heads": 2, "codebook_dim": 3, **options})


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("projected", [False, True])
def test_codes_and_output_of_indices(heads, projected):
    module = make(heads=heads, codebook_dim=5 if projected else 6 // heads).eval()
    quantized, indices, _ = module(torch.randn(4, 5, 6))
    codes = module.get_codes_from_indices(indices)
    for h in range(heads):
        row = indices[..., h] if heads > 1 else indices
        width = module.codebook.shape[-1]
        assert torch.equal(codes[..., h * width : (h + 1) * width], module.codebook[h][row])
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(module.get_output_from_indices(indices[:, :2]), quantized[:, :2])


@pytest.mark.parametrize("heads", [1, 2])
def test_masked_positions_count_nowhere(heads):
    x = torch.randn(4, 5, 6)
    mask = torch.rand(4, 5) < 0.6
    torch.manual_seed(0)
    masked = make(heads=heads, threshold_ema_dead_code=0.5, kmeans_init=True)
    twin = make(heads=heads, threshold_ema_dead_code=0.5, kmeans_init=True)
    twin.load_state_dict(masked.state_dict())
    for _ in range(3):
        torch.manual_seed(1)
        quantized, indices, loss = masked(x, mask=mask)
        torch.manual_seed(1)
        wanted, found, right = twin(x[mask][None])
        assert torch.equal(indices[mask], found[0])
        assert (indices[~mask] == -1).all()
        assert not quantized[~mask].any()
        torch.testing.assert_close(quantized[mask], wanted[0])
        torch.testing.assert_close(loss, right)
        assert all(
            torch.equal(a, b) for a, b in zip(masked.state_dict().values(), twin.state_dict().values(), strict=True)
        )
        x = x + 0.1


def test_lengths_are_a_mask():
    module, x = make().eval(), torch.randn(3, 5, 6)
    lens = torch.tensor([5, 2, 0])
    indices = module(x, lens=lens)[1]
    assert torch.equal(indices, module(x, mask=torch.arange(5) < lens[:, None])[1])
    assert ((indices >= 0).all(-1).sum(-1) == lens).all()


def test_a_call_may_freeze_the_keys():
    module, x = make(), torch.randn(3, 5, 6)
    before = module.codebook.clone()
    module(x, freeze_codebook=True)
    assert torch.equal(module.codebook, before)
    module.freeze_codebook = True
    module(x)
    assert torch.equal(module.codebook, before)
    module(x, freeze_codebook=False)
    assert not torch.equal(module.codebook, before)


def test_one_position_without_its_axis():
    module, x = make().eval(), torch.randn(3, 6)
    quantized, indices, _ = module(x)
    assert indices.shape == (3, 2)
    assert torch.equal(quantized, module(x[:, None])[0][:, 0])
    assert make(heads=1, codebook_dim=6)(x)[1].shape == (3,)


def test_the_keys_can_be_set():
    module = make()
    keys = torch.randn(2, 9, 3)
    module.codebook = keys
    assert torch.equal(module.state_dict()["_codebook.embed"], keys)


def test_rows_that_are_not_finite_replace_nothing():
    module = make(threshold_ema_dead_code=2.0, kmeans_init=True)
    x = torch.randn(2, 5, 6)
    x[0, 0, 0] = torch.nan
    for _ in range(3):
        module(x)
    assert module.codebook.isfinite().all()
    assert module._codebook.embed_avg.isfinite().all()


def test_masks_that_do_not_fit():
    module, x = make(), torch.randn(3, 5, 6)
    for mask in (torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5)):
        with pytest.raises(ValueError, match=r"expected a mask torch.bool \(b, n\) for x \(b, n, dim\) = \(3, 5, 6\)"):
            module(x, mask=mask)
    with pytest.raises(ValueError, match="expected mask or lens, got both"):
        module(x, mask=torch.ones(3, 5, dtype=torch.bool), lens=torch.tensor([1, 2, 3]))
