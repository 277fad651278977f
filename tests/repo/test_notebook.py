"""The example notebook runs from top to bottom, and shows what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "docs" / "example.ipynb"


def shape_of(text: str) -> str:
    """The text without its numbers, whose last digits may differ from machine to machine."""
    return re.sub(r"\d+(\.\d+)?", "0", text)


def test_the_example_notebook(capsys):
    pytest.importorskip("sklearn", reason="needs kvb[demo]")
    book = json.loads(NOTEBOOK.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        shown = "".join("".join(output["text"]) for output in cell["outputs"])
        assert shape_of(capsys.readouterr().out) == shape_of(shown)
    assert len(names["accuracies"]) == 5
    assert names["accuracies"][-1] > 0.93
    assert torch.equal(names["bottleneck"].bottleneck.keys, names["keys"])
    assert torch.allclose(names["logits"], names["bottleneck"](names["features"][names["test"]]), atol=1e-6)
