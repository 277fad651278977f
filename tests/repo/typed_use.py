# What type checkers say of calls: test_types.py has mypy read this file, and pyright where it is installed.

from torch import Tensor
from typing_extensions import assert_type

import kvb
from kvb.compat import discrete_key_value_bottleneck_pytorch as lucidrains
from kvb.compat.key_value_bottleneck import core
from kvb.modules.outputs import Intermediates


def lookups(bottleneck: kvb.KeyValueBottleneck, x: Tensor) -> Tensor:
    assert_type(bottleneck(x, return_values_only=True), Tensor)
    assert_type(bottleneck(x, pool="mean", return_values_only=False), kvb.BottleneckOutput)
    assert_type(bottleneck.freeze_keys(), kvb.KeyValueBottleneck)
    assert_type(bottleneck.values.shape[0] + bottleneck.topk + bottleneck.num_codebooks, int)
    assert_type(bottleneck.encode(x), Tensor)
    values: Tensor = bottleneck(x)
    return values + bottleneck(x).mean(1)


def encodings(model: kvb.BottleneckedEncoder, x: Tensor) -> None:
    assert_type(model(x, return_values_only=True), Tensor)
    assert_type(model(input_ids=x, return_values_only=False).indices, Tensor)
    assert_type(model.prepare(x), kvb.BottleneckedEncoder)
    assert_type(model.bottleneck, kvb.KeyValueBottleneck)


def memories(memory: kvb.DiscreteKeyValueBottleneck, x: Tensor) -> None:
    assert_type(memory(x), Tensor)
    assert_type(memory(x, return_intermediates=True), tuple[Tensor, Intermediates])


def published(
    bottleneck: core.KeyValueBottleneck,
    encoder: core.DinoBottleneckedEncoder,
    memory: lucidrains.DiscreteKeyValueBottleneck,
    x: Tensor,
) -> None:
    assert_type(bottleneck(x), tuple[Tensor, ...])
    assert_type(encoder(x), tuple[Tensor, ...])
    assert_type(memory(x), Tensor)
    assert_type(memory(x, return_intermediates=True), tuple[Tensor, tuple[Tensor, Tensor, Tensor]])


def choices(x: Tensor) -> None:
    kvb.KeyValueBottleneck(2, 8, 4, 4, init_mode="k-means")  # type: ignore[arg-type]
    kvb.splitters.make("chunks", 8, 2, 4)  # type: ignore[arg-type]
    kvb.functional.gather(x, x, pool="max")  # type: ignore[arg-type]
