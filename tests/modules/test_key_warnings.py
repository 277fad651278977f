"""Keys of which hardly any is in use are warned of once, and a threshold for dead codes is made of sizes."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

import kvb
from kvb import KeyValueBottleneck

pytestmark = pytest.mark.fallback

C, K, D = 4, 32, 6


def features(kind, n=600):
    x = torch.randn(n, C, D, generator=torch.Generator().manual_seed(0))
    return {"centered": x, "off": x + 10, "little off": x + 5, "tiny": x * 0.05, "alike": x * 0 + 1}[kind]


def warned(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in found]


def init(module, x, *arguments, **options):
    return lambda: module.init_keys(x.split(100), *arguments, progress=False, **options)


@pytest.mark.parametrize("kind", ["off", "little off", "tiny"])
def test_features_that_random_keys_do_not_suit(kind):
    torch.manual_seed(0)
    module = KeyValueBottleneck(C, K, D, 3)
    (message,) = warned(init(module, features(kind)))
    assert message.startswith("hardly any key is in use, so that values cannot tell inputs apart: of 32 pairs")
    assert 'call init_keys(..., "kmeans++"), or center and scale the features' in message
    assert not warned(init(module, features(kind)))  # once for a module, and for its copies
    assert not warned(init(copy.deepcopy(module), features(kind)))
    assert not warned(init(KeyValueBottleneck(C, K, D, 3), features(kind), "kmeans++"))


def test_features_that_are_alike():
    (message,) = warned(init(KeyValueBottleneck(C, K, D, 3), features("alike"), "kmeans", epochs=0))
    assert message.endswith("look at the features, and at what the splitter makes of them")


def test_features_that_suit():
    torch.manual_seed(0)
    for method in ("random", "sample", "kmeans", "kmeans++"):
        assert not warned(init(KeyValueBottleneck(C, K, D, 3), features("centered"), method))


def test_few_rows_or_pairs_mean_nothing():
    assert not warned(init(KeyValueBottleneck(C, K, D, 3), features("off", 4 * K - 1)))
    assert not warned(init(KeyValueBottleneck(C, 7, D, 3), features("off")))
    broken = features("off")
    broken[: -4 * K + 1, :, 0] = float("nan")
    assert not warned(init(KeyValueBottleneck(C, K, D, 3), broken))


def test_the_warning_points_to_the_call():
    module = KeyValueBottleneck(C, K, D, 3)
    with pytest.warns(UserWarning, match="hardly any key") as found:
        module.init_keys(features("off"), progress=False)
    assert found[0].filename == __file__


def test_most_queries_at_one_pair():
    """All pairs are hit, but one takes nearly all: only the moving averages show that."""
    x = torch.zeros(2000, 1, 1)
    x[::40] = torch.arange(50.0)[:, None, None] % 8
    module = KeyValueBottleneck(1, 8, 1, 1, decay=0.5)
    module.set_keys(torch.arange(8.0).view(1, 8, 1))
    (message,) = warned(init(module, x, "random"))
    assert "of 8 pairs of a codebook 8 were hit, perplexity 1." in message


def test_the_threshold_of_dead_codes():
    assert kvb.dead_code_threshold(4096, 256, factor=0.1) == pytest.approx(0.1 * 256 / 4096)
    assert kvb.dead_code_threshold(256, 32, 49) == pytest.approx(0.1 * 32 * 49 / 256)
    assert kvb.dead_code_threshold(256, 32, factor=0) == 0
    for arguments, error in (((0, 32), ValueError), ((256, 0), ValueError), ((256, 3.5), TypeError)):
        with pytest.raises(error, match="must be a positive integer"):
            kvb.dead_code_threshold(*arguments)
    with pytest.raises(ValueError, match="factor must be in"):
        kvb.dead_code_threshold(256, 32, factor=-math.pi)


def test_a_pair_with_an_equal_share_lives_and_one_with_a_tenth_of_it_dies():
    threshold = kvb.dead_code_threshold(2, 20, factor=0.5)
    module = KeyValueBottleneck(1, 2, 1, 1, decay=0.0, threshold_ema_dead_code=threshold)
    module.set_keys(torch.tensor([[[-1.0], [1.0]]])).train()
    module(torch.tensor([-1.0] * 10 + [1.0] * 10).view(20, 1, 1))
    assert module.cluster_size.tolist() == [[10, 10]]
    module(torch.tensor([-1.0] * 19 + [1.0]).view(20, 1, 1))
    assert module.cluster_size.tolist() == [[19, 5]]  # the second began again, at the threshold
