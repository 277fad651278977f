"""The benchmarks themselves: wrong results are caught, rows run, reports say what happened. Nothing here is timed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvb
from kvb import functional, reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # the benchmarks are not part of the package

from benchmarks import ceilings, counting, cpu, table, training, verify  # noqa: E402
from benchmarks.peers import finders, plain  # noqa: E402
from benchmarks.timing import Absent, Contestant, Effort, Race, Ratio, WrongResult, race  # noqa: E402

ONCE = Effort(rounds=1, seconds=0.0)


@pytest.fixture
def search():
    """A small search and its right answer."""
    queries, keys = torch.randn(40, 2, 3, 6), torch.randn(3, 50, 6)
    indices, distances = reference.nearest(queries, keys, reference.pack_keys(keys), None, 1)
    return queries, keys, indices[..., 0], distances[..., 0]


def test_a_right_search_passes(search):
    verify.nearest(*search)


def test_a_wrong_key_is_rejected_even_with_its_own_distance(search):
    queries, keys, indices, _ = search
    indices = (indices + 1) % 50
    distances = (queries - keys[torch.arange(3), indices]).square().sum(-1)
    with pytest.raises(WrongResult, match="not the nearest"):
        verify.nearest(queries, keys, indices, distances)


def test_a_wrong_distance_is_rejected(search):
    queries, keys, indices, distances = search
    distances[7, 1, 2] *= 1 + 1e-5
    with pytest.raises(WrongResult, match="a distance is off"):
        verify.nearest(queries, keys, indices, distances)


def test_an_index_out_of_range_is_rejected(search):
    queries, keys, indices, distances = search
    indices[0, 0, 0] = 50
    with pytest.raises(WrongResult, match="outside"):
        verify.nearest(queries, keys, indices, distances)


def test_one_wrong_choice_among_many_is_rejected(search):
    queries, keys, indices, _ = search
    other = indices.clone()
    other[39, 1, 2] = (other[39, 1, 2] + 1) % 50
    with pytest.raises(WrongResult, match="1 of 240"):
        verify.same_choice(queries, keys, other, indices)


def test_several_nearest_keys_are_judged_rank_by_rank(search):
    queries, keys, *_ = search
    indices, distances = reference.nearest(queries, keys, reference.pack_keys(keys), None, 4)
    verify.several_nearest(queries, keys, indices, distances)
    with pytest.raises(WrongResult, match="not the nearest"):
        verify.several_nearest(queries, keys, indices.flip(-1), distances.flip(-1))
    with pytest.raises(WrongResult, match="a distance is off"):
        verify.several_nearest(queries, keys, indices, distances * (1 + 1e-5))


def test_either_of_two_equal_keys_will_do(search):
    queries, keys, indices, _ = search
    twins = torch.cat([keys, keys], 1)
    verify.same_choice(queries, twins, indices + 50, indices)


def test_a_wrong_value_is_rejected():
    values, indices = torch.randn(3, 50, 4), torch.randint(50, (5, 2, 3))
    for pool in ("none", "mean"):
        out = functional.gather(values, indices, pool=pool)
        verify.fetched(values, indices, out, pool, "bscv")
        out[0, 0] += 1e-4
        with pytest.raises(WrongResult):
            verify.fetched(values, indices, out, pool, "bscv")


def test_a_wrong_sum_or_count_is_rejected():
    rows, indices = torch.randn(20, 2, 3, 4), torch.randint(5, (20, 2, 3))
    hits, sums = reference.accumulate(rows, indices, 5)
    verify.sums(rows, indices, sums, hits)
    with pytest.raises(WrongResult, match="sums of codebook"):
        verify.sums(rows, indices, sums * 1.0001, hits)
    with pytest.raises(WrongResult, match="hits of codebook"):
        verify.sums(rows, indices, sums, hits + 1)


def test_wrong_results_are_never_timed():
    calls = []

    def reject(result):
        raise WrongResult(result)

    contestants = {
        "right": Contestant(lambda: calls.append("right"), lambda result: None),
        "wrong": Contestant(lambda: calls.append("wrong"), reject),
    }
    with pytest.raises(WrongResult):
        race(contestants, ONCE)
    assert calls == ["right", "wrong"]


def test_contestants_take_turns():
    turns = []
    contestants = {
        name: Contestant(lambda: None, lambda result: None, lambda name=name: turns.append(name)) for name in "ab"
    }
    result = race(contestants, Effort(rounds=2, seconds=0.0))
    assert "".join(turns) == "ab" + "abab"
    assert [len(result.turns[name]) for name in "ab"] == [2, 2]


def test_ratio_is_of_medians():
    times = Race({"a": [[1.0, 2.0, 9.0], [2.0]], "b": [[1.0], [4.0]]})
    assert times.ratio("a", "b") == Ratio(2.0 / 2.5, 0.875, 1.625)
    assert times.ratio("a", "b", 10).value == 10 * 2.0 / 2.5


@pytest.mark.parametrize("chunk", [50, 700, 1 << 20])
def test_chunked_lookup_is_right(chunk):
    queries, keys, values = torch.randn(4, 5, 3, 6), torch.randn(3, 50, 6), torch.randn(3, 50, 2)
    indices = plain.Chunked(keys, 20, chunk)(queries)
    verify.sampled_choice(queries, keys, indices)
    verify.fetched(values, indices, finders.fetch(values, indices), "none", "bcsv")


def test_multiply_add_peak():
    try:
        loop, flops = ceilings.multiply_add(1)
    except Absent as absent:
        pytest.skip(str(absent))
    loop.verify(loop.run())
    assert flops > ceilings.ITERATIONS


def test_no_compiler_is_absent(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ceilings._library.cache_clear()
    with pytest.raises(Absent, match="compiler"):
        ceilings.multiply_add(1)


def test_verdicts():
    assert table.Row("a", None, 1.5).verdict(1.5) == "ok"
    assert table.Row("a", None, 1.5).verdict(1.4) == "below must"
    assert table.Row("a", None, 1.5, at_most=True).verdict(1.6) == "above must"
    assert table.Row("a", None).verdict(1.0) == ""


@pytest.fixture
def one_row(monkeypatch):
    """Run a table of one row; its exit status."""
    threads = torch.get_num_threads()

    def run(measure, *arguments):
        monkeypatch.setattr(cpu, "ROWS", (table.Row("one:row", measure, 2.0),))
        return cpu.main(["--quick", "--only", "one", *arguments])

    yield run
    torch.set_num_threads(threads)


def test_wrong_result_is_an_error(one_row, capsys):
    def wrong(quick):
        raise WrongResult("3 of 4 are off")

    assert one_row(wrong) == 1
    assert "WRONG: 3 of 4 are off" in capsys.readouterr().out


def test_absent_peer_is_no_error(one_row, capsys):
    def absent(quick):
        raise Absent("no such peer")

    assert one_row(absent) == 0
    assert "absent: no such peer" in capsys.readouterr().out


def test_slow_is_no_error(one_row, capsys, tmp_path):
    report = tmp_path / "report.json"
    slow = table.Measured(2e-3, 1e-3, "s", "somebody", Ratio(0.5, 0.4, 0.6))
    assert one_row(lambda quick: slow, "--json", str(report)) == 0
    assert "below must" in capsys.readouterr().out
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["name"], row["unit"], row["ratio"]["value"], row["must"]) == ("one:row", "s", 0.5, 2.0)


def test_unknown_row_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["--only", "nothing"])
    assert "nearest:paper" in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 1 + 1e-5])
def test_a_wrong_step_of_training_is_rejected(number):
    start, codes, targets = torch.randn(3, 50, 4), torch.randint(50, (20, 3)), torch.randint(4, (20,))
    values = start.clone()
    loss = kvb.training.sgd_step(values, codes, targets).loss
    if number == 1:
        verify.trained(start, codes, targets, values, loss)
        with pytest.raises(WrongResult, match="values are off"):
            verify.trained(start, codes, targets, start, loss)
        values[0, codes[0, 0]] += 1e-5
        with pytest.raises(WrongResult, match="4 of 600 values are off"):
            verify.trained(start, codes, targets, values, loss)
    else:
        with pytest.raises(WrongResult, match="loss .*, expected"):
            verify.trained(start, codes, targets, values, loss * number)


def test_the_steps_of_training_are_verified_as_they_are_raced(monkeypatch):
    """Every contestant, on a small problem."""
    monkeypatch.setattr(training, "PAPER", training.PAPER._replace(B=16, C=4, K=30))
    batches = training._batches()
    sgd = training.SPARSE(batches, lambda params: kvb.optim.RowwiseSGD(params, lr=0.3), check=True)
    dense = training.DENSE(batches, lambda params: torch.optim.SGD(params, lr=0.3), check=True)
    race({"fused": training._fused(batches), "row-sgd": sgd, "dense": dense}, ONCE)
    wrong = training.DENSE(batches, lambda params: torch.optim.SGD(params, lr=0.31), check=True)
    with pytest.raises(WrongResult, match="values are off"):
        race({"wrong": wrong}, ONCE)


def test_command_line():
    if importlib.util.find_spec("faiss") is None:
        pytest.skip("faiss is not installed")
    command = [sys.executable, "-m", "benchmarks.cpu", "--quick", "--only", "nearest:smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "faiss" in done.stdout.splitlines()[-1]


# --- heads on several pairs -------------------------------------------------------------------------------------------


@pytest.fixture
def small_counting(monkeypatch):
    for name, size in {"SAMPLES": 1300, "C": 4, "K": 40, "BATCH": 64}.items():
        monkeypatch.setattr(counting, name, size)


def test_heads_on_several_pairs_are_held_to_seconds(small_counting, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(counting, "COUNTING_BAR", 1e9)
    monkeypatch.setattr(counting, "EPOCHS_BAR", 1e-9)
    assert counting.main(["--quick", "--json", str(tmp_path / "found.json")]) == 1
    first, second = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (first["verdict"], second["verdict"]) == ("ok", "below must")
    assert first["peer"] == pytest.approx(1e9 / 10)
    assert "below their bars: epochs" in capsys.readouterr().out


def test_wrong_counts_are_rejected(small_counting, monkeypatch, capsys):
    add = counting.ClassCounts.add
    monkeypatch.setattr(counting.ClassCounts, "add", lambda self, codes, labels: add(self, codes[1:], labels[1:]))
    assert counting.main(["--quick", "--only", "counting"]) == 1
    assert "WRONG: counts" in capsys.readouterr().out
