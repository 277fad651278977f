"""Numbers whose squares leave the range of their dtype: the nearest key is found all the same."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from kvb import functional, ops, reference

pytestmark = [pytest.mark.contract, pytest.mark.fallback, pytest.mark.memory]

# Triton's interpreter runs one program after the other.
QUERIES, RANKS = (6, 12) if ops.backend("cpu") == "triton" else (50, 60)


def exact_order(query, keys):
    """Squared distances as fractions: Python's integers neither overflow nor round."""
    point = [Fraction(x) for x in query.tolist()]
    return [sum((a - Fraction(b)) ** 2 for a, b in zip(point, key, strict=True)) for key in keys.tolist()]


def rounded(number):
    try:
        return float(number)
    except OverflowError:
        return math.inf


def searches(op):
    return lambda queries, keys, topk: op.nearest(queries, keys, op.pack_keys(keys), None, topk)


BACKENDS = pytest.mark.parametrize("nearest", [searches(torch.ops.kvb), searches(reference)], ids=["cpu", "torch"])


@BACKENDS
@pytest.mark.parametrize("exponent", [-323, -310, -300, -200, -162, -154, -150, 0, 150, 154, 162, 200, 300, 307])
def test_float64_is_right_at_every_magnitude(nearest, exponent):
    scale = 10.0**exponent if exponent > -308 else 10.0 ** (exponent + 100) * 1e-100
    keys = torch.randn(2, 40, 5, dtype=torch.float64) * scale
    queries = torch.randn(30, 1, 2, 5, dtype=torch.float64) * scale
    indices, distances = nearest(queries, keys, 3)
    for b in range(30):
        for c in range(2):
            exact = exact_order(queries[b, 0, c], keys[c])
            order = sorted(range(40), key=lambda k, exact=exact: (exact[k], k))[:3]
            found = indices[b, 0, c].tolist()
            # Distances within rounding of each other may change places.
            for got, want in zip(found, order, strict=True):
                assert abs(exact[got] - exact[want]) <= exact[want] * Fraction(2) ** -48
            for got, distance in zip(found, distances[b, 0, c].tolist(), strict=True):
                want = rounded(exact[got])
                assert distance == want or abs(distance - want) <= 1e-14 * want + 1e-323


@BACKENDS
def test_float64_tells_keys_of_all_magnitudes_apart(nearest):
    keys = torch.tensor([[[10.0**e, 0.0] for e in range(-320, 308, 4)]], dtype=torch.float64)
    keys[:, keys.shape[1] // 2] *= -1
    indices, distances = nearest(keys.transpose(0, 1)[:, None], keys, 2)
    assert indices[:, 0, 0, 0].tolist() == list(range(keys.shape[1]))
    assert (distances[..., 0] == 0).all()
    zero = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    assert nearest(zero, keys, keys.shape[1])[0].flatten().tolist() == list(range(keys.shape[1]))


@BACKENDS
def test_float64_differences_that_overflow(nearest):
    most = torch.finfo(torch.float64).max
    keys = torch.tensor([[[most, most], [-most, -most], [most, -most / 2], [0.0, 0.0]]], dtype=torch.float64)
    queries = torch.tensor([-most, -most], dtype=torch.float64).view(1, 1, 1, 2)
    indices, distances = nearest(queries, keys, 4)
    assert indices.flatten().tolist() == [1, 3, 2, 0]
    assert distances.flatten().tolist() == [0, math.inf, math.inf, math.inf]


@BACKENDS
@pytest.mark.parametrize("exponent", [-300, 0, 300])
def test_float64_ties_go_to_the_lowest_index(nearest, exponent):
    keys = torch.randint(-2, 3, (1, 60, 2)).double() * 2.0**exponent
    queries = torch.randint(-2, 3, (QUERIES, 1, 1, 2)).double() * 2.0**exponent
    indices, _ = nearest(queries, keys, RANKS)
    plain = (queries[:, 0] / 2.0**exponent - keys / 2.0**exponent).square().sum(-1)
    assert torch.equal(indices[:, 0, 0], plain.sort(dim=-1, stable=True).indices[..., :RANKS])


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, s) for s in (1e-30, 1e-20, 1.0, 1e20, 1e37)]
    + [(torch.float64, s) for s in (1e-300, 1e-160, 1e160, 1e300)],
)
def test_a_cold_draw_is_the_nearest_key_at_every_magnitude(dtype, scale):
    keys, queries = torch.randn(2, 20, 4, dtype=dtype) * scale, torch.randn(50, 1, 2, 4, dtype=dtype) * scale
    want, _ = functional.nearest(queries, keys)
    drawn, _ = functional.sample(queries, keys, temperature=min(max(scale * scale * 1e-6, 5e-324), 1e300))
    assert (drawn == want).float().mean() > 0.97  # but for near-ties


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e20), (torch.float64, 1e150), (torch.float32, 1e-18)])
def test_a_draw_follows_the_same_law_at_every_magnitude(dtype, scale):
    power = 2.0 ** round(math.log2(scale))
    keys, queries = torch.randn(1, 6, 4, dtype=dtype), torch.randn(1, 1, 1, 4, dtype=dtype).expand(4000, 1, 1, 4)
    draws = []
    for factor in (1.0, power):
        generator = torch.Generator().manual_seed(3)
        temperature = 2.0 * factor * factor
        draws.append(functional.sample(queries * factor, keys * factor, temperature=temperature, generator=generator))
    assert torch.equal(draws[0][0], draws[1][0])
    assert draws[0][0].unique().numel() > 3
