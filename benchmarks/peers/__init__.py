"""What kvb is measured against: packages, imported if they are installed, and plain PyTorch.

A peer is one file here with a ``PEERS`` of its own; nothing else has to know of it. Nothing of the packages is copied.
A peer that is not installed raises ``Absent`` when it is asked for, with the way to get it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from benchmarks.peers import need
from benchmarks.peers.peer import Offer, Peer
from benchmarks.timing import Absent


@functools.cache
def known() -> dict[str, Peer]:
    """Every peer by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {peer.name: peer for module in modules for peer in getattr(module, "PEERS", ())}


def offers(suite: str) -> dict[str, Offer]:
    """How every peer of a suite takes part in it."""
    return {peer.name: peer.suites[suite] for peer in known().values() if suite in peer.suites}


def listed() -> dict[str, tuple[str, str]]:
    """What every peer is and takes part in, and why it is absent ("" if it is installed)."""
    found = {}
    for peer in known().values():
        why = ""
        try:
            need.package(peer.module, peer.install)
        except Absent as absent:
            why = str(absent)
        found[peer.name] = (f"{', '.join(peer.suites)}: {peer.about}", why)
    return found
