"""The README's Python runs as it stands there, and its promises hold."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import kvb

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_and_both_ways_agree(capsys):
    first, second = BLOCKS[0].split("codes = ")
    names: dict = {}
    exec(first, names)
    searched = names["logits"]
    exec("codes = " + second, names)
    assert searched.shape == (1000, 10)
    torch.testing.assert_close(names["logits"], searched)
    names["logits"].sum().backward()
    assert names["bottleneck"].values.grad.abs().sum() > 0
    assert "kmeans: 1000 rows a codebook (0 skipped)" in capsys.readouterr().out


def test_the_examples_of_training_run():
    names: dict = {}
    fused, rows = (block for block in BLOCKS if "sgd_step" in block or "RowwiseAdam" in block)
    exec(BLOCKS[0], names)
    exec(fused, names)
    learned = names["bottleneck"].values.detach().clone()
    assert names["data"].codes.dtype == torch.int16
    assert learned.any()
    with pytest.warns(UserWarning, match="moves a row by 0.51 of what it learned"):
        exec(rows, names)
    moved = (names["bottleneck"].values != learned).any(-1)
    touched = torch.zeros_like(moved)
    touched[torch.arange(64), names["data"].codes[:256].long()] = True
    assert torch.equal(moved, touched)
    (block,) = (block for block in BLOCKS if "unlearning" in block)
    exec(block, names)
    fetched = names["per_class"][3] > 0
    assert not names["mask"][fetched].all()
    assert names["mask"][~fetched].all()
    assert names["bottleneck"].pair_mask is None


def test_the_example_of_an_encoder_runs():
    (block,) = (block for block in BLOCKS if "BottleneckedEncoder" in block)
    names: dict = {"torch": torch, "kvb": kvb}
    exec(block, names)
    assert names["values"].shape == (100, 16, 10, 4, 4)
    assert names["logits"].shape == (100, 10)
    assert not names["model"].bottleneck.update_keys


def test_the_example_of_embeddings_runs(tmp_path, monkeypatch):
    (block,) = (block for block in BLOCKS if "DiscreteKeyValueBottleneck" in block)
    monkeypatch.chdir(tmp_path)
    names: dict = {"torch": torch, "kvb": kvb}
    exec(block, names)
    assert names["output"].shape == (2, 64, 128)
    assert names["each"].shape == (2, 4, 64, 128)
    torch.testing.assert_close(names["each"].mean(1), names["output"])
    assert names["quantized"].shape == (2, 64, 512)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.pt"]


def test_the_published_packages_are_where_it_says():
    for module in re.findall(r"^\| `([\w.]+) import …`", README, re.MULTILINE):
        assert importlib.import_module(f"kvb.compat.{module}")


def test_every_file_it_names_exists():
    for name in re.findall(r"\]\((docs/[^)]+)\)|^    (kvb/\S+)", README, re.MULTILINE):
        assert (ROOT / "".join(name)).exists(), name
