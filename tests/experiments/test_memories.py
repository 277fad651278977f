"""The study of memory layers, on a small part; and its tables, from courses written by hand."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs kvb[demo]")
pytest.importorskip("sklearn", reason="needs kvb[demo]")

from kvb.experiments import memories
from kvb.experiments.data import texts
from kvb.experiments.language_model import LanguageModel, LowRank, Shape, adapt
from kvb.experiments.memories import Course, Plan, Point

TINY = Plan(
    *(1, 6000, 12, 2e-3, 4, 2),
    rows=20,
    background=8,
    windows=4,
    shape=Shape(dim=16, heads=2, context=16, batch=4, num_keys=8, topk=4),
)


def course(way, rate, *points, seed=0):
    return Course(way, seed, rate, 5, [Point(place, *each) for place, each in enumerate(points)])


def test_texts_come_with_python_and_differ_in_kind():
    first, second = texts.reference(5000), texts.sources(5000)
    assert (len(first.train), len(first.test)) == (4500, 500)
    assert first.train.max() < 256
    assert b"def " in bytes(second.train.tolist())
    assert len(texts.sources(400_000).train) == len(texts.reference(400_000).train) == 360_000


def test_blocks_cost_the_same():
    shape = Shape()
    products = shape.memory_products()
    dense = sum(one.in_features * one.out_features for one in shape.dense() if isinstance(one, torch.nn.Linear))
    assert abs(dense / products - 1) < 0.01
    memory = shape.memory()
    linear = sum(one.weight.numel() for one in memory.modules() if isinstance(one, torch.nn.Linear))
    assert products == linear + memory.keys.numel() + memory.heads * memory.topk * memory.dim_values


def test_low_rank_starts_where_the_model_is():
    model = LanguageModel(TINY.shape, Shape.memory)
    x = torch.randint(256, (2, 16))
    before = model(x)
    learning = adapt(model, 2)
    assert torch.equal(model(x), before)
    assert {id(one) for one in learning} == {id(one) for one in model.parameters() if one.requires_grad}
    assert sum(isinstance(one, LowRank) for one in model.modules()) == len(learning) / 2


def test_forgetting_at_equal_gain():
    half = course("dense, all weights", 0.1, (2.0, 3.0), (2.4, 2.8))
    assert half.forgotten(0.1) == pytest.approx(0.2)
    assert half.forgotten(0.3) is None
    slow = course("dense, all weights", 0.01, (2.0, 3.0), (2.05, 2.95), (2.1, 2.9))
    sparse = course("memory, rows by KL", 0.1, (2.0, 3.0), (2.01, 2.95))
    chosen = memories.best_of_rates([half, slow, sparse], 0.1)
    assert chosen == {"dense, all weights": [slow], "memory, rows by KL": [sparse]}
    table = memories.forgetting([half, slow, sparse], 0.1)
    assert "| dense, all weights | 0.01 | +0.100 ± 0.000 | +0.100 ± 0.000 | +0.100 ± 0.000 | 5 numbers |" in table
    assert "| memory, rows by KL | 0.1 | not reached | +0.050 ± 0.000 | +0.010 ± 0.000 | 5 rows |" in table
    assert "do not forget least: “dense, all weights” does" in memories.verdict([half, slow, sparse], 0.1)
    assert "memory forget least" in memories.verdict([half, slow, sparse], 0.04)


def test_a_small_part_without_a_network(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("there is no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    lines: list[str] = []
    memories.main(texts.STUDY, "memory", tmp_path, 0, lines.append, TINY)
    record = json.loads((tmp_path / "memory.json").read_text())
    assert {one["way"] for one in record["courses"]} == set(memories.WAYS)
    assert (tmp_path / "memory.png").stat().st_size > 1000
    by_rows = [one for one in record["courses"] if one["way"].endswith(("TF-IDF", "KL"))]
    assert all(0 < one["moved"] <= 4 * TINY.rows for one in by_rows)
    for one in record["courses"]:
        assert [point["step"] for point in one["points"]] == [0, 2, 4]
    assert "| memory, low-rank |" in (tmp_path / "memory.md").read_text()


def test_the_page_shows_the_file():
    docs = Path(__file__).parents[2] / "docs"
    record, page = json.loads((docs / "memory.json").read_text()), (docs / "memory.md").read_text()
    plan = Plan(**{**record["plan"], "shape": Shape(**record["plan"]["shape"])})
    courses = [Course(**{**one, "points": [Point(**point) for point in one["points"]]}) for one in record["courses"]]
    assert memories.losses(record["blocks"], plan) in page
    assert memories.forgetting(courses, plan.gain) in page
    assert memories.verdict(courses, plan.gain) in page
    assert all(version in page for version in record["versions"].values())
    assert sorted({one.seed for one in courses}) == [0, 1, 2]
