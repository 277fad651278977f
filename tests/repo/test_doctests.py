"""The examples in docstrings do what they show, and every public name has one and a place in the reference."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import kvb

ROOT = Path(__file__).parents[2]
# Imported with kvb or by name; what is public in them is their ``__all__``, or else all that they define.
ROOMS = ["", "functional", "splitters", "decoders", "training", "optim", "unlearning", "counting", "growth", "compat"]
ROOMS = [f"kvb.{room}".rstrip(".") for room in [*ROOMS, "distributed", "plots", "report"]]
INTEGRATIONS = {"kvb.integrations.lightning": "lightning", "kvb.integrations.torchmetrics": "torchmetrics"}
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))


def with_examples() -> list[str]:
    files = [path for path in (ROOT / "kvb").rglob("*.py") if ">>> " in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sorted(files)]


def public(module: str) -> dict[str, str]:
    """The docstrings of the functions and classes that a module offers."""
    room = importlib.import_module(module)
    names = getattr(room, "__all__", None) or [
        name
        for name, thing in vars(room).items()
        if name[0] != "_" and getattr(thing, "__module__", "").startswith("kvb." if module == "kvb" else module)
    ]
    found = {name: getattr(room, name) for name in names}
    return {
        name: inspect.getdoc(it) or "" for name, it in found.items() if inspect.isclass(it) or inspect.isroutine(it)
    }


def written(module: str) -> dict[str, str]:
    """The same by reading the source, for modules that need a package that may be missing."""
    nodes = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text()).body
    defined = [node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_"]
    return {node.name: ast.get_docstring(node) or "" for node in defined}


def run_examples(module: str, **names: object) -> None:
    names |= {"torch": torch, "kvb": kvb}
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module), module, extraglobs=names)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    for test in tests:
        torch.manual_seed(0)
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0


@pytest.mark.parametrize("module", [module for module in with_examples() if module not in INTEGRATIONS])
@pytest.mark.filterwarnings("ignore")
def test_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if module in ("kvb.plots", "kvb.report"):
        pytest.importorskip("matplotlib", reason="needs kvb[demo]").use("agg")
    run_examples(module)


@pytest.mark.integrations
@pytest.mark.parametrize("module", INTEGRATIONS)
def test_examples_with_packages_of_others(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = pytest.importorskip(INTEGRATIONS[module], reason="pip install 'kvb[integrations]'")
    run_examples(module, **{package.__name__: package})


@pytest.mark.parametrize("module", [*ROOMS, *INTEGRATIONS])
def test_every_public_name_has_an_example_and_a_place_in_the_reference(module):
    names = written(module) if module in INTEGRATIONS else public(module)
    assert names
    assert not [name for name, document in names.items() if ">>> " not in document]
    shown = set(re.findall(r"^\.\. auto\w+:: (kvb[\w.]+)", REFERENCE, re.MULTILINE))
    assert not [name for name in names if f"{module}.{name}" not in shown]
