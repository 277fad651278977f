"""Closed choices of strings are types: one definition for the type checker and for the check at run time."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch

import kvb
from kvb import functional, splitters

MODULES = ("functional", "splitters", "decoders", "optim", "training", "unlearning", "growth", "data")
VALUES, INDICES = torch.zeros(2, 5, 3), torch.zeros(4, 1, 2, dtype=torch.int64)
CALLS = {
    "pool": (functional.Pool, lambda one: functional.gather(VALUES, INDICES, pool=one)),
    "layout": (functional.Layout, lambda one: functional.gather(VALUES, INDICES, layout=one)),
    "splitting_mode": (splitters.Mode, lambda one: splitters.make(one, 8, 2, 4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_the_type_allows_is_what_is_taken(name):
    kind, call = CALLS[name]
    options = typing.get_args(kind)
    for option in options:
        call(option)
    listed = re.escape(", ".join(map(repr, options)))
    with pytest.raises(ValueError, match=f"{name} must be one of {listed}; got 'no such'"):
        call("no such")


@pytest.mark.parametrize("module", MODULES)
def test_no_public_option_is_any_string(module):
    found = importlib.import_module(f"kvb.{module}")
    for name, thing in vars(found).items():
        if name.startswith("_") or getattr(thing, "__module__", "") != found.__name__ or not callable(thing):
            continue
        for option, parameter in inspect.signature(thing).parameters.items():
            kinds = str(parameter.annotation).split(" | ")
            assert "str" not in kinds or "PathLike[str]" in str(kinds), f"{module}.{name}({option}: str)"


def test_a_choice_is_spelled_out_once():
    """No file lists all the options of a choice again."""
    choices = [set(typing.get_args(kind)) for kind, _ in CALLS.values()]
    found = []
    for path in Path(kvb.__file__).parent.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                words = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                found += [path.name for options in choices if words == options]
    assert sorted(found) == ["splitters.py", "values.py", "values.py"]
