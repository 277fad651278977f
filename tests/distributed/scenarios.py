"""Scenarios of learning together, and what one process has after the same batches put together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import kvb

C, K, D, V = 3, 8, 4, 2
STATE = ("keys", "keys_avg", "cluster_size", "cluster_size_counter", "kvb_mask", "kvb_flags", "initted")


class Scenario(NamedTuple):
    """sizes: samples of every process, step by step. nan: (step, process) to how many rows are spoiled."""

    world: int
    sizes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    frozen: bool = False
    masked: bool = False
    nan: dict[tuple[int, int], int] = {}  # noqa: RUF012
    dtype: torch.dtype = torch.float32
    keys: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()
    padded: bool = False


def batch(scenario: Scenario, step: int, rank: int) -> torch.Tensor:
    """What a process reads in a step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    n = scenario.sizes[step][rank]
    x = torch.randn(n, C, *scenario.shape, D, generator=generator)
    x.flatten(0, -2)[: scenario.nan.get((step, rank), 0), 0] = torch.nan
    return x.to(scenario.dtype)


def mask(scenario: Scenario, step: int, rank: int) -> torch.Tensor | None:
    """Which positions of a batch count."""
    if not scenario.padded:
        return None
    generator = torch.Generator().manual_seed(1000 + 100 * step + rank)
    return torch.rand(scenario.sizes[step][rank], *scenario.shape, generator=generator) > 0.4


def module(scenario: Scenario, **options: Any) -> kvb.KeyValueBottleneck:
    torch.manual_seed(7)
    made = kvb.KeyValueBottleneck(C, K, D, V, **{"decay": 0.7, **scenario.options, **options}).to(scenario.keys)
    if scenario.masked:
        made.mask_pairs(torch.arange(C * K).view(C, K) % 3 > 0)
    return made.freeze_keys() if scenario.frozen else made


def state(of: kvb.KeyValueBottleneck) -> dict[str, torch.Tensor]:
    return {name: of.get_buffer(name).clone() for name in STATE}


def together(scenario: Scenario) -> dict[str, torch.Tensor]:
    """In one of several processes."""
    own, rank = module(scenario), dist.get_rank()
    for step in range(len(scenario.sizes)):
        own(batch(scenario, step, rank), mask=mask(scenario, step, rank))
    return state(own)


def alone(scenario: Scenario) -> dict[str, torch.Tensor]:
    """In one process, on the union of the batches."""
    own = module(scenario)
    for step in range(len(scenario.sizes)):
        ranks = range(scenario.world)
        masks = torch.cat([mask(scenario, step, rank) for rank in ranks]) if scenario.padded else None
        own(torch.cat([batch(scenario, step, rank) for rank in ranks]), mask=masks)
    return state(own)


def same(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state that all processes hold, bit for bit."""
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name
    return found[0]


def close(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Equal up to the rounding of sums; integers exactly."""
    for name, tensor in want.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
