"""kvb's own plain PyTorch, which runs where the extension was not built: nobody needs a compiler to install kvb."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.peer import Peer
from benchmarks.timing import Absent, Contestant
from kvb import ops, reference

NAME = "kvb in PyTorch"


def _packed(keys: Tensor) -> Tensor:
    if ops.backend(keys.device.type) == "torch":
        raise Absent("this kvb has no extension: it would race with itself")
    return reference.pack_keys(keys)


def search(given: Any) -> Contestant:
    keys, packed = given.keys, _packed(given.keys)
    return given.contestant(
        lambda: reference.nearest(given.queries, keys, packed, None, 1), lambda found: found[0][..., 0]
    )


def forward(given: Any) -> Contestant:
    keys, packed = given.keys, _packed(given.keys)

    def run() -> tuple[Tensor, Tensor]:
        codes = reference.nearest(given.queries, keys, packed, None, 1)[0][..., 0]
        return reference.gather(given.values, codes, "none", "bcsv"), codes

    return given.contestant(run)


PEERS = (Peer(NAME, "kvb without its extension", {"search": search, "forward": forward}, quick=False),)
