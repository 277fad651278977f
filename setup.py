"""The package list and the switch for the C++ extension; everything else is in pyproject.toml."""

import os
from glob import glob

from setuptools import find_packages, setup

CHOICES = ("auto", "1", "0")

build_ext = os.environ.get("KVB_BUILD_EXT", "auto")
if build_ext not in CHOICES:
    raise ValueError(f"KVB_BUILD_EXT={build_ext!r}: allowed values are {', '.join(CHOICES)}")

sources = sorted(glob("csrc/*.cpp"))
if build_ext == "1" and not sources:
    raise RuntimeError("KVB_BUILD_EXT=1, but there is nothing to build: csrc/ holds no .cpp file")

# kvb/kernels is a symlink to kernels/, which has no __init__.py: so no top-level `kernels` is ever
# installed, and another package of that name is never shadowed.
setup(packages=[*find_packages(include=["kvb", "kvb.*"]), "kvb.kernels"])
