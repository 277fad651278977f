"""The README's Python runs as it stands there, and its promises hold."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_both_ways_agree(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    first, second = block.split("codes = ")
    names: dict = {}
    exec(first, names)
    searched = names["logits"]
    exec("codes = " + second, names)
    assert searched.shape == (1000, 10)
    torch.testing.assert_close(names["logits"], searched)
    names["logits"].sum().backward()
    assert names["bottleneck"].values.grad.abs().sum() > 0
    assert "kmeans: 1000 rows a codebook (0 skipped)" in capsys.readouterr().out


def test_every_file_it_names_exists():
    for name in re.findall(r"\]\((docs/[^)]+)\)|^    (kvb/\S+)", README, re.MULTILINE):
        assert (ROOT / "".join(name)).exists(), name
