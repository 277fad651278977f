"""Fetching and summing values with PyTorch's own indexing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import finders
from benchmarks.peers.peer import Peer
from benchmarks.shapes import SHAPES
from benchmarks.timing import Contestant


def gather_by_index(given: Any) -> Contestant:
    values, codes = given.values, given.codes
    books = torch.arange(len(values))[:, None]
    return given.contestant(lambda: values[books, codes.transpose(1, 2)])


def gather_by_index_select(given: Any) -> Contestant:
    return given.contestant(lambda: finders.fetch(given.values, given.codes))


def backward_by_index(given: Any) -> Contestant:
    """Autograd of ``values[books, indices]``."""
    books = torch.arange(given.C)[:, None]
    with torch.enable_grad():
        values = torch.zeros(given.C, given.K, given.V, requires_grad=True)
        fetched = values[books, given.codes.transpose(1, 2)]

    def run() -> Tensor:
        (found,) = torch.autograd.grad(fetched, values, given.grad, retain_graph=True)
        return found

    return given.contestant(run)


def backward_by_index_add(given: Any) -> Contestant:
    C, K, V = given.C, given.K, given.V

    def run() -> Tensor:
        flat = (given.codes + torch.arange(C) * K).transpose(1, 2).flatten()
        return torch.zeros(C * K, V).index_add_(0, flat, given.grad.view(-1, V)).view(C, K, V)

    return given.contestant(run)


PEERS = (
    Peer(
        "torch index",
        "values[c, indices] and its autograd",
        {"gather": gather_by_index, "backward": backward_by_index},
        shapes=tuple(SHAPES),
    ),
    Peer("torch index_select", "one index_select", {"gather": gather_by_index_select}, shapes=tuple(SHAPES)),
    Peer("torch index_add", "one index_add_", {"backward": backward_by_index_add}, shapes=tuple(SHAPES)),
)
