"""Shared by all tests: which backend runs the operators, a fixed seed, and uninitialised memory that shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import kvb


def pytest_sessionstart():
    """A run that says what it tests stops where it would test something else."""
    backend, folder = os.environ.get("KVB_EXPECT_BACKEND"), os.environ.get("KVB_EXPECT_FOLDER")
    found, place = kvb.ops.backend("cpu"), Path(kvb.__file__).resolve()
    if backend and backend != found:
        pytest.exit(f"KVB_EXPECT_BACKEND={backend}, but the CPU backend is {kvb.info()['backend on cpu']}", 1)
    if folder and Path(folder).resolve() not in place.parents:
        pytest.exit(f"KVB_EXPECT_FOLDER={folder}, but kvb lies in {place.parent}", 1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Deterministic mode fills every ``torch.empty`` with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
