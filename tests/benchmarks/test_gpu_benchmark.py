"""``python -m benchmarks.gpu`` as far as it goes without a GPU: rows run and are judged, reports say what happened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks import gpu, journal, machine, report, results
from benchmarks.peers import published
from benchmarks.shapes import GPU
from benchmarks.suites import on_device
from benchmarks.timing import Absent, Contestant
from kvb import functional

CPU = torch.device("cpu")
LIMITS = {"copy": 1e9, "matmul": 1e12}


@pytest.fixture
def session():
    return gpu.Session(CPU, small=True)


@pytest.fixture
def given():
    return on_device.problem(gpu.small(GPU["seed"]), CPU, with_values=True)


def measured(operator, session, who="kvb"):
    row = next(row for row in gpu.ROWS if (row.operator, row.who) == (operator, who))
    (facts,) = gpu.measure(row, session, LIMITS)
    return facts


@pytest.mark.parametrize("operator", sorted({row.operator for row in gpu.ROWS}))
def test_every_operator_runs_and_is_right(operator, session):
    facts = measured(operator, session)
    assert not {"wrong", "absent"} & set(facts)
    assert facts["seconds"] > 0
    assert facts["GB/s"] > 0
    assert facts["share wrong"] == 0


@pytest.mark.parametrize("operator", ["search", "lookup"])
def test_plain_pytorch_is_right_on_a_sample(operator, session):
    facts = measured(operator, session, "torch baddbmm")
    assert "absent" not in facts
    assert facts["share wrong"] == 0


def test_names_of_rows_are_distinct():
    names = [(row.name, row.who) for row in gpu.ROWS]
    assert len(set(names)) == len(names)


def test_the_share_of_wrong_choices(given):
    found, _ = functional.nearest(given.queries, given.keys)
    indices = found.clone()
    indices[:16, 0, 0] = (indices[:16, 0, 0] + 1) % given.shape.K
    assert on_device.Search(given).share_wrong(indices) == 16 / (4 * 64)


def test_memory_halves_queries():
    shape = GPU["paper-1m"]
    assert on_device.reduced(shape, 1 << 50, True) == shape
    less = on_device.reduced(shape, 40 << 30, True)
    assert less.N in (shape.N // 2, shape.N // 4, shape.N // 8)
    assert less._replace(N=shape.N) == shape


def test_memory_that_pytorch_keeps_for_itself_is_free(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("info"), 7)[::-1])
    assert machine.available_bytes(torch.device("cuda")) == 7
    assert calls == ["empty", "info"]


def test_ceilings_are_of_random_numbers(session, monkeypatch):
    """A product of ones or zeros needs less power, and so runs at a higher clock."""
    for name in ("ones", "zeros"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a ceiling of equal numbers"))
    factors = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: factors.extend((a, b)) or matmul(a, b))
    found = gpu.ceilings(session)
    assert found["copy"] > 0
    assert found["matmul"] > 0
    assert all(factor.unique().numel() > 1000 for factor in factors[:2])


def test_a_row_that_waits_for_the_host_is_measured_as_a_graph_too(session, monkeypatch):
    monkeypatch.setattr(gpu.Session, "bound_by_host", lambda self, seconds: True)
    monkeypatch.setattr(gpu, "graphed", lambda contestant: Contestant(contestant.run, contestant.verify))
    row = next(row for row in gpu.ROWS if row.operator == "search")
    plain, graph = gpu.measure(row, session, LIMITS)
    assert (plain["who"], graph["who"]) == ("kvb", "kvb, CUDA graph")
    assert graph["seconds"] > 0
    peer = next(row for row in gpu.ROWS if row.who == "torch baddbmm")
    assert len(list(gpu.measure(peer, session, LIMITS))) == 1


def test_what_bounds_a_call():
    class Clock(gpu.EventClock):
        submitting = 1e-4

    session = gpu.Session(CPU)
    assert not session.bound_by_host(0.0), "on a CPU nothing waits for a device"
    session.clock = Clock(CPU)
    session.clock.submitting = 1e-4
    assert session.bound_by_host(1.1e-4)
    assert not session.bound_by_host(2e-4)


def test_a_wrong_result_is_named_and_never_timed(session, monkeypatch):
    found = torch.zeros(64, 1, 4, 1).long(), torch.zeros(64, 1, 4, 1)
    monkeypatch.setattr(torch.ops.kvb, "nearest", lambda *_: found)
    facts = measured("search", session)
    assert "a distance is off" in facts["wrong"]
    assert "seconds" not in facts
    assert "WRONG: WrongResult: a distance is off" in gpu.line(facts)


def test_a_peer_that_fails_is_absent(session, monkeypatch):
    def fail(given):
        raise ZeroDivisionError("of a peer")

    monkeypatch.setattr(gpu.peers, "offers", lambda suite: {"torch baddbmm": fail})
    assert measured("search", session, "torch baddbmm")["absent"] == "failed: ZeroDivisionError: of a peer"


def test_an_absent_peer_says_how_to_get_it(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "discrete_key_value_bottleneck_pytorch", None)
    with pytest.raises(Absent, match="pip install discrete-key-value-bottleneck-pytorch"):
        published.memories(on_device.Memories(given))


def test_time_runs_out():
    row = next(row for row in gpu.ROWS if row.operator == "pack")
    (facts,) = gpu.measure(row, gpu.Session(CPU, small=True, limit=-1.0), LIMITS)
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
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--only", *rows]) == 0
    table = (tmp_path / "gpu.txt").read_text()
    assert table == capsys.readouterr().out
    machine, ceilings, *found = journal.read(tmp_path / "gpu.jsonl")
    assert machine["device"] == "cpu"
    assert set(ceilings["ceilings"]) == {"copy", "matmul"}
    assert {row["operator"] for row in found} == {"pack", "search"}


def test_every_row_is_on_disk_before_the_next(tmp_path, monkeypatch):
    seen = []
    measure = gpu.measure

    def watched(row, session, limits):
        seen.append([facts["shape"] for facts in list(journal.read(tmp_path / "gpu.jsonl"))[2:]])
        return measure(row, session, limits)

    monkeypatch.setattr(gpu, "measure", watched)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--only", "pack"]) == 0
    assert seen == [[], ["paper-256"], ["paper-256", "seed"]]


def test_a_device_that_is_lost_ends_the_run(tmp_path, monkeypatch, capsys):
    """What comes after an error that sticks says nothing about kvb."""
    monkeypatch.setattr(functional, "pack_keys", lambda keys: torch.rand(4))
    monkeypatch.setattr(gpu, "device_is_lost", lambda device: True)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--only", "pack"]) == 1
    assert len(list(journal.read(tmp_path / "gpu.jsonl"))) == 3
    assert "the device no longer works: 2 rows are left" in capsys.readouterr().out


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    journal.Journal(file).write({"a": 1})
    with file.open("a") as more:
        more.write('{"a": ')
    assert list(journal.read(file)) == [{"a": 1}]


def test_a_wrong_row_is_the_exit_status(tmp_path, monkeypatch):
    monkeypatch.setattr(functional, "pack_keys", lambda keys: torch.rand(4))
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--only", "pack"]) == 1


# --- filed results ----------------------------------------------------------------------------------------------------


def row(who, seconds, **more):
    quantiles = dict.fromkeys(results.QUANTILES, seconds) | {"calls": 7}
    sizes = {"N": 8192, "C": 2, "K": 300, "D": 12, "V": 10}
    facts = {"operator": "search", "shape": "paper-8k", "who": who, "sizes": sizes, "nbytes": 3e6, "flops": 9e9}
    return facts | {"seconds": seconds, **quantiles, "share wrong": 0.0} | more


def test_what_a_card_did_is_filed_and_shown(tmp_path):
    pytest.importorskip("matplotlib")
    facts = machine.device_facts(CPU) | {"machine": "A Card", "backend on cuda": "triton"}
    lines = journal.Journal(tmp_path / "gpu.jsonl")
    about = {"device": "cuda", "slug": "a-card", "load": 0.5, "date": "2026-11-28", "threads": 16}
    lines.write({"machine": facts, **about})
    lines.write({"ceilings": {"copy": 3e12, "matmul": 8e14}})
    lines.write(row("kvb", 2e-5))
    lines.write(row("kvb, CUDA graph", 1.5e-5))
    lines.write(row("flash-kmeans", 4e-5, **{"share wrong": 0.01}))
    lines.write({"operator": "search", "shape": "paper-8k", "who": "torch.compile", "absent": "no time left"})
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text("<!-- bench: gpu -->\n<!-- end -->\n")
    assert report.main([str(tmp_path / "gpu.jsonl")], tmp_path) == 0

    (found,) = results.committed(folder=tmp_path / "benchmarks" / "results").values()
    (filed,) = found["rows"]
    assert (found["device"], found["slug"], filed["shape"]) == ("cuda", "a-card", "search:paper-8k")
    assert filed["ceiling"] == {"kind": "flops", "rate": 8e14}
    assert results.peers(filed) == ["flash-kmeans"]
    assert filed["absent"] == {"torch.compile": "no time left"}
    assert results.share(filed) == pytest.approx(9e9 / 8e14 / 2e-5)
    text = page.read_text()
    assert "| search:paper-8k | 20 us | flash-kmeans (1.00% wrong) | 40 us | 2x | 56% |" in text
    assert "A Card, 16 threads, triton, torch" in text


def test_a_run_is_filed_as_it_was_written(tmp_path):
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--only", "pack", "lookup:seed"]) == 0
    found = results.from_gpu(journal.read(tmp_path / "gpu.jsonl"))
    assert [one["shape"] for one in found["rows"]] == ["lookup:seed", "pack:paper-256", "pack:seed", "pack:k65536-d64"]
