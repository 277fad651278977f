"""``python -m benchmarks.gpu`` as far as it goes without a GPU: rows run and are judged, reports say what happened."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks import gpu
from benchmarks.shapes import GPU
from benchmarks.timing import Absent
from kvb import functional

CPU = torch.device("cpu")
LIMITS = {"copy": 1e9, "matmul": 1e12}


@pytest.fixture
def clock():
    return gpu.Clock(CPU, 0.0)


@pytest.fixture
def given():
    return gpu.problem(gpu.small(GPU["seed"]), CPU, with_values=True)


def measured(operator, clock, who="kvb"):
    row = next(row for row in gpu.ROWS if (row.operator, row.who) == (operator, who))
    return gpu.measure(row, clock, LIMITS, quick=True)


@pytest.mark.parametrize("operator", sorted({row.operator for row in gpu.ROWS}))
def test_every_operator_runs_and_is_right(operator, clock):
    facts = measured(operator, clock)
    assert not {"wrong", "absent"} & set(facts)
    assert facts["seconds"] > 0
    assert facts["GB/s"] > 0
    assert facts["share wrong"] == 0


def test_names_of_rows_are_distinct():
    names = [(row.name, row.who) for row in gpu.ROWS]
    assert len(set(names)) == len(names)


def test_eager_search_is_right_in_pieces(given, monkeypatch):
    monkeypatch.setattr(gpu, "SCORES", 2500)
    work = gpu.eager(given)
    found = work.run()
    assert found.shape == (4, 64)
    assert work.judge(found) == 0


def test_the_share_of_wrong_choices(given):
    found, _ = functional.nearest(given.queries, given.keys)
    indices = found[:, 0].T.clone()
    indices[0, :16] = (indices[0, :16] + 1) % given.shape.K
    assert gpu._share_wrong(given, indices) == 16 / (4 * 64)


def test_memory_halves_queries():
    shape = GPU["paper-1m"]
    assert gpu.reduced(shape, 1 << 50, True) == shape
    less = gpu.reduced(shape, 40 << 30, True)
    assert less.N in (shape.N // 2, shape.N // 4, shape.N // 8)
    assert less._replace(N=shape.N) == shape


def test_a_wrong_result_is_named_and_never_timed(clock, monkeypatch):
    monkeypatch.setattr(functional, "nearest", lambda *_, **__: (torch.zeros(64, 1, 4).long(), torch.zeros(64, 1, 4)))
    facts = measured("search", clock)
    assert "a distance is off" in facts["wrong"]
    assert "seconds" not in facts
    assert "WRONG: WrongResult: a distance is off" in gpu.line(facts)


def test_a_peer_that_fails_is_absent(clock):
    def fail(*_):
        raise ZeroDivisionError("of a peer")

    row = gpu.Row("search", "seed", "eager", lambda given: gpu.eager(given, fail))
    assert gpu.measure(row, clock, LIMITS, True)["absent"] == "failed: ZeroDivisionError: of a peer"


def test_an_absent_peer_says_how_to_get_it(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "discrete_key_value_bottleneck_pytorch", None)
    with pytest.raises(Absent, match="pip install discrete-key-value-bottleneck-pytorch"):
        gpu.published(given)


def test_time_runs_out():
    row = next(row for row in gpu.ROWS if row.operator == "pack")
    facts = gpu.measure(row, gpu.Clock(CPU, 0.0, limit=-1.0), LIMITS, True)
    assert "no time left" in facts["absent"]


def test_without_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path / "out")])
    assert stopped.value.code == "benchmarks.gpu needs a CUDA or HIP device, and torch finds none here"
    assert not (tmp_path / "out").exists()


def test_unknown_rows_name_the_known_ones(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "nothing"])
    assert "search:seed" in capsys.readouterr().err


def test_reports(tmp_path, capsys):
    rows = ["pack", "search:few-queries"]
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--only", *rows]) == 0
    table = (tmp_path / "gpu.txt").read_text()
    assert table == capsys.readouterr().out
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["ceilings"]) == {"copy", "matmul"}
    assert {row["operator"] for row in report["rows"]} == {"pack", "search"}
    assert any(row.get("absent") == "a CPU has no CUDA graphs" for row in report["rows"])


def test_a_wrong_row_is_the_exit_status(tmp_path, monkeypatch):
    monkeypatch.setattr(functional, "pack_keys", lambda keys: torch.rand(4))
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--only", "pack"]) == 1
