"""How a peer that can only search takes part in whole modules: the rest is plain PyTorch, as one writes it by hand.

A finder is prepared for its queries and keys, and takes queries [B, S, C, D] to indices [B, S, C].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import Offer
from benchmarks.timing import Contestant

Finder = Callable[[Tensor], Tensor]
Prepare = Callable[[Tensor, Tensor], Finder]


def fetch(values: Tensor, indices: Tensor) -> Tensor:
    """values [C, K, V] at indices [B, S, C], as [B, C, S, V]: one ``index_select``."""
    C, K, V = values.shape
    B, S, _ = indices.shape
    flat = (indices + torch.arange(C, device=values.device) * K).transpose(1, 2).flatten()
    return values.view(C * K, V).index_select(0, flat).view(B, C, S, V)


def search(prepare: Prepare, given: Any) -> Contestant:
    return given.contestant(functools.partial(prepare(given.queries, given.keys), given.queries))


def forward(prepare: Prepare, given: Any) -> Contestant:
    find = prepare(given.queries, given.keys)

    def run() -> tuple[Tensor, Tensor]:
        found = find(given.queries)
        return fetch(given.values, found), found

    return given.contestant(run)


def memories(prepare: Prepare, given: Any) -> Contestant:
    find = prepare(given.queries, given.keys)

    def run() -> tuple[Tensor, Tensor]:
        found = find(given.project())
        return fetch(given.values, found).mean(1), found

    return given.contestant(run)


def training_step(prepare: Prepare, given: Any) -> Contestant:
    values, find = nn.Parameter(given.start.clone()), prepare(given.queries, given.keys)

    def look_up() -> tuple[Tensor, Tensor]:
        found = find(given.project())
        return fetch(values, found).mean(1), found

    return given.contestant(values, look_up)


def end_to_end(prepare: Prepare, given: Any) -> Contestant:
    find = prepare(given.queries, given.keys)

    def run() -> tuple[Tensor, Tensor]:
        found = find(given.project())
        return fetch(given.values, found).mean((1, 2)), found

    return given.contestant(run)


SUITES = {function.__name__: function for function in (search, forward, memories, training_step, end_to_end)}


def offers(prepare: Prepare, *suites: str) -> dict[str, Offer]:
    """A finder's part in suites, by their names."""
    return {name: functools.partial(SUITES[name], prepare) for name in suites}
