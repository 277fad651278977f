"""Shapes drawn at random: the same for a seed, all of them verified, every loss listed."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks.race import __main__ as command_line
from benchmarks.race import draws, racing, searches, summary, tables
from benchmarks.suites import KVB
from benchmarks.timing import Effort, ProcessorClock
from kvb import functional

ONCE = Effort(rounds=1, seconds=0.0, turn=0.0)
SMALL = {"N": (1, 20), "C": (1, 5), "K": (2, 40), "D": (1, 20), "V": (1, 9), "T": (1, 5)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shapes that take no time, no compiler, and one round."""
    monkeypatch.setattr(draws, "RANGES", SMALL)
    monkeypatch.setattr(draws, "COMPILED", 0.0)
    monkeypatch.setattr(racing, "QUICK", ONCE)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_seed_draws_the_same_shapes_within_their_bounds(monkeypatch):
    monkeypatch.undo()
    found, left_out = zip(*(draws.draw(1, index) for index in range(240)), strict=True)
    assert [draws.draw(1, index)[0] for index in range(240)] == [*found]
    assert draws.draw(2, 0)[0] != found[0]
    assert set(sum(left_out, collections.Counter())) <= {"work", *found[0].numbers}
    for one in found:
        assert not one.excess()
        sizes = one._asdict() | {"N": one.N}
        assert all(low <= sizes[letter] <= high for letter, (low, high) in draws.RANGES.items() if sizes[letter] > 1)
        assert one.T <= one.K
    assert {one.dtype for one in found} == set(draws.DTYPES)
    for name in ("packed", "compiled", "operator", "pool"):
        assert len({getattr(one, name) for one in found}) > 1
    assert {one.S > 1 for one in found} == {True, False}


@pytest.mark.parametrize("index", range(24))
def test_every_opponent_is_right(index):
    draw, _ = draws.draw(0, index)
    found = racing.race(draw, ONCE)
    assert "wrong" not in found
    assert found["best"] in found["seconds"]
    assert KVB in found["seconds"]
    assert found["low"] <= found["high"]
    allowed = ("faiss has no float64", "faiss cannot be imported")
    assert all(why.startswith(allowed) for why in found["absent"].values()), found["absent"]
    json.dumps(found)


@pytest.mark.parametrize("dtype", draws.DTYPES)
@pytest.mark.parametrize("operator", ["search", "forward", "gather", "backward"])
def test_every_dtype_is_verified(operator, dtype):
    draw = draws.draw(0, [*draws.OPERATORS].index(operator))[0]._replace(dtype=dtype, pool="none")
    assert "ratio" in racing.race(draw, ONCE)


def test_an_opponent_that_is_off_is_not_timed(monkeypatch):
    monkeypatch.setattr(searches, "_ranked", lambda scores, draw: torch.zeros(draw.B, draw.S, draw.C, draw.T).long())
    monkeypatch.setattr(tables, "_rows", lambda draw, codes: codes)
    search = draws.draw(0, 0)[0]._replace(B=9, S=1, C=3, K=20, T=1, dtype="float32")
    for draw, names in (
        (search, ("torch.cdist", "torch baddbmm")),
        (search._replace(operator="gather"), ("torch index_select",)),
        (search._replace(operator="backward"), ("torch index_add", "torch scatter_add", "torch embedding")),
    ):
        absent = racing.race(draw, ONCE)["absent"]
        assert all("wrong, not timed" in absent[name] for name in names), absent


def test_a_wrong_kvb_is_reported_and_fails_the_command(monkeypatch, tmp_path, capsys):
    gather = functional.gather
    monkeypatch.setattr(functional, "gather", lambda *args, **options: gather(*args, **options) + 1)
    arguments = ["--n", "3", "--only", "gather", "--quick", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 1
    assert "WRONG: gather " in capsys.readouterr().out


def test_a_race_goes_on_where_it_was_cut_off(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--quick", "--only", "gather", "backward", "--out", str(tmp_path)]
    assert command_line.main(["--n", "4", *arguments]) == 0
    journal = tmp_path / "race.jsonl"
    before = journal.read_text()
    journal.write_text(before + '{"index": 8, "cut o')
    race, raced = racing.race, []
    monkeypatch.setattr(racing, "race", lambda draw, *rest: raced.append(draw.index) or race(draw, *rest))
    assert command_line.main(["--n", "10", *arguments]) == 0
    assert raced == [8, 9]
    assert journal.read_text().startswith(before)
    assert [json.loads(line)["index"] for line in journal.read_text().splitlines()[1:]] == [2, 3, 8, 9]
    assert (tmp_path / "race.svg").is_file()
    assert (tmp_path / "race.txt").read_text() in capsys.readouterr().out + "\n"
    with pytest.raises(SystemExit, match="of another race"):
        command_line.main(["--n", "4", "--seed", "1", *arguments])


def test_losses_come_with_their_shapes_the_worst_one_first():
    draw = draws.draw(0, 0)[0]
    line = {**draw._asdict(), "work": 1, "best": "faiss", "seconds": {"faiss": 1e-3, KVB: 2e-3}, "low": 0, "high": 9}
    lines = [line | {"ratio": ratio} for ratio in (0.96, 0.9, 2.0, 0.5)]
    said = summary.text(lines, {"work": 2})
    assert [one["ratio"] for one in summary.losses(lines)] == [0.5, 0.9]
    assert "2 of 4 shapes lost" in said
    assert said.index(" 0.50 ") < said.index(" 0.90 ")
    assert str(draw) in said
    assert summary.mean(lines) == pytest.approx((0.96 * 0.9 * 2.0 * 0.5) ** 0.25)
    assert "2 draws were too large" in said


def test_processor_time_counts_no_waiting():
    import time

    waited, found = ProcessorClock().timed(lambda: time.sleep(0.05) or 7)
    assert waited < 0.04
    assert found == 7
