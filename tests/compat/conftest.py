"""What several files of this room use."""

from __future__ import annotations

import sys

import pytest

import kvb


@pytest.fixture
def aliased(monkeypatch):
    """``alias``, undone afterwards."""
    for name in kvb.compat.aliases.NAMES:  # where a package is installed, another test may have imported it
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield kvb.compat.alias
    kvb.compat.unalias()
