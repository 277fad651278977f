"""Shared by the tests of interpreted kernels."""

from __future__ import annotations

import pytest


@pytest.fixture
def launched(monkeypatch):
    """Every launch of a test, in order."""
    from launches import LAUNCHERS, Spy  # there may be no Triton where other tests run

    spy = Spy()
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "run", spy.run)
    return spy
