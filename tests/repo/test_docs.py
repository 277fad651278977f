"""README and docs: their Python runs and prints what they show, their links lead somewhere, their promises hold."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import kvb
from kvb.experiments import protocol

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
notebooks = importlib.import_module("notebooks")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [path for path in PAGES if notebooks.needs(path.read_text())]
ADDRESS = re.compile(r"https://[\w-]+(\.[\w-]+)*\.[a-z]{2,}(/[\w./~%+=?&#-]*)?")  # nothing is asked over the network
README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "docs" / "guide.md").read_text()


def blocks(text: str) -> list[str]:
    """Those that need kvb alone; tests/integrations/test_recipes_of_others.py runs the others."""
    return re.findall(r"(?<!-->\n)```python\n(.*?)```", text, re.DOTALL)


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as hosts of Markdown make them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# --- every page -------------------------------------------------------------------------------------------------------


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


def without_numbers(text: str) -> str:
    """Last digits differ from machine to machine, and so does the width of a number."""
    return re.sub(r" *\d+(\.\d+)?(e-\d+)?", "0", text).strip()


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's Python in a folder; where the page shows what a block prints, it prints that."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # which would outlive the page
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)  # what torchrun sets
    cells = notebooks.cells(page.read_text())
    assert [cell.source for cell in cells if cell.code] == [block.rstrip() for block in blocks(page.read_text())]
    for cell, output in zip(cells, notebooks.printed(cells), strict=True):
        assert cell.shown is None or without_numbers(cell.shown) == without_numbers(output)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OTHERS], ids=name_of)
@pytest.mark.filterwarnings("ignore:this optimizer moves rows")
def test_every_block_runs_in_its_order(page, tmp_path, monkeypatch):
    if "sklearn" in page.read_text() or "plots" in page.read_text():
        pytest.importorskip("sklearn", reason="needs kvb[demo]")
    run(page, tmp_path, monkeypatch)


@pytest.mark.integrations
@pytest.mark.parametrize("page", OTHERS, ids=name_of)
def test_every_block_runs_with_packages_of_others(page, tmp_path, monkeypatch):
    if why := notebooks.missing(notebooks.needs(page.read_text())):
        pytest.skip(why)
    run(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert not [link for link in links if "://" in link and not ADDRESS.fullmatch(link)]
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    for name in re.findall(r"(?:^|[\s`])((?:kvb|tests|benchmarks|kernels|csrc|docs)/[\w./-]*\w)", text):
        assert list(ROOT.glob(name)) or "*" in name, f"{page.name} names {name}"
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{page.name} names {test}"


def test_the_map_shows_every_room_and_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.parent.relative_to(ROOT) for path in (ROOT / "kvb").glob("*/__init__.py")]
    files = [path.relative_to(ROOT) for path in (ROOT / "kvb").glob("*.py")]
    shown = set(re.findall(r"`((?:kvb|csrc|kernels|benchmarks|tests)/[\w/.]*)`", text))
    assert {f"{room}/" for room in rooms} | {str(file) for file in files} <= shown


@pytest.mark.parametrize("data", sorted(path.stem[9:] for path in (ROOT / "docs").glob("protocol-*.json")))
def test_the_experiments_are_those_of_the_files(data):
    report = pytest.importorskip("kvb.experiments.report", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
    record = json.loads((ROOT / "docs" / f"protocol-{data}.json").read_text())
    page = (ROOT / "docs" / "experiments.md").read_text()
    assert report.markdown(protocol.from_json(record)[1]) in page
    assert all(version in page for version in record["versions"].values())


def test_the_edits_are_those_of_the_file():
    editing = pytest.importorskip("kvb.experiments.editing", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
    records = json.loads((ROOT / "docs" / "edits-digits.json").read_text())["records"]
    page = (ROOT / "docs" / "experiments.md").read_text()
    assert all(editing.row(editing.Edit(**record)) in page for record in records)


def test_the_studies_are_those_of_the_files():
    names = ("codes", "facts", "generate")
    pytest.importorskip("kvb.experiments.codes", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
    codes, facts, generate = (importlib.import_module(f"kvb.experiments.{name}") for name in names)
    page = (ROOT / "docs" / "studies.md").read_text()

    def records(name):
        record = json.loads((ROOT / "docs" / f"{name}.json").read_text())
        assert all(version in page for version in record["versions"].values())
        return record["records"]

    for data in ("mnist", "20ng", "digits"):
        assert codes.table(records(f"codes-{data}")) in page
    assert generate.table(records("generate-digits")) in page
    assert facts.link_table([one for one in records("facts") if "MRR" in one]) in page
    assert facts.edit_table([facts.Edits(**one) for one in records("facts") if "MRR" not in one]) in page


def test_the_readme_is_short_and_starts_with_use():
    lines = README.splitlines()
    assert len(lines) <= 140
    assert any("pip install" in line for line in lines[:40])
    assert "```python" in lines[:40]
    assert lines.index("```", lines.index("```python")) < 40


# --- what the examples show -------------------------------------------------------------------------------------------


def test_searching_and_decoding_agree(capsys):
    first, second = blocks(README)[0].split("codes = ")
    names: dict = {}
    exec(first, names)
    searched = names["logits"]
    exec("codes = " + second, names)
    assert searched.shape == (1000, 10)
    torch.testing.assert_close(names["logits"], searched)
    names["logits"].sum().backward()
    assert names["bottleneck"].values.grad.abs().sum() > 0
    assert "kmeans: 1000 rows per codebook (0 skipped)" in capsys.readouterr().out


def test_training_moves_fetched_rows_alone_and_a_class_is_forgotten():
    names: dict = {}
    guide = blocks(GUIDE)
    autograd, codes, fused, forgetting = (
        next(block for block in guide if sign in block)
        for sign in ("RowwiseAdam", "data = bottleneck.encode_dataset", "sgd_step", "unlearning")
    )
    exec(guide[0], names)
    before = names["bottleneck"].values.detach().clone()
    with pytest.warns(UserWarning, match="moves a row by 0.51 of what it learned"):
        exec(autograd, names)
    exec(codes, names)
    assert names["data"].codes.dtype == torch.int16
    touched = torch.zeros(64, 256, dtype=torch.bool)
    touched[torch.arange(64), names["data"].codes.long()] = True
    assert torch.equal((names["bottleneck"].values != before).any(-1), touched)
    exec(fused, names)
    assert torch.equal(names["bottleneck"].values.detach().any(-1), touched)
    exec(forgetting, names)
    fetched = names["per_class"][3] > 0
    assert not names["mask"][fetched].all()
    assert names["mask"][~fetched].all()
    assert names["bottleneck"].pair_mask is None


def test_the_shapes_with_an_encoder():
    block = next(block for block in blocks(GUIDE) if "BottleneckedEncoder(encoder" in block)
    names: dict = {"torch": torch, "kvb": kvb}
    exec(block, names)
    assert names["values"].shape == (100, 16, 10, 4, 4)
    assert names["logits"].shape == (100, 10)
    assert not names["model"].bottleneck.update_keys


def test_the_shapes_of_embeddings(tmp_path, monkeypatch):
    (block,) = (block for block in blocks(GUIDE) if "DiscreteKeyValueBottleneck(" in block)
    monkeypatch.chdir(tmp_path)
    names: dict = {"torch": torch, "kvb": kvb}
    exec(block, names)
    assert names["output"].shape == (2, 64, 128)
    assert names["each"].shape == (2, 4, 64, 128)
    torch.testing.assert_close(names["each"].mean(1), names["output"])
    assert names["quantized"].shape == (2, 64, 512)
    (block,) = (block for block in blocks(GUIDE) if "kvb.save(" in block)
    exec(block, names)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.pt"]


def test_the_published_packages_are_where_it_says():
    modules = re.findall(r"^\| `([\w.]+) import …`", README, re.MULTILINE)
    assert len(modules) == 3
    assert all(importlib.import_module(f"kvb.compat.{module}") for module in modules)
