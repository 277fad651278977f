"""``python -m benchmarks.gpu_day`` as far as it goes without a GPU: every part runs, and nothing found is lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks.gpu_day import __main__ as command
from benchmarks.gpu_day import counters, smoke
from benchmarks.gpu_day.day import LOST, Day, finish
from benchmarks.journal import Journal, read
from kvb import functional, ops

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
WITHOUT_TRITON = pytest.mark.skipif(sys.platform != "linux", reason="no Triton for this platform")


@pytest.fixture
def day(tmp_path):
    return Day(tmp_path, CPU, small=True, budget=600.0)


def run(part, out, *more):
    return command.main([part, "--out", str(out), "--device", "cpu", "--small", "--budget", "600", *more])


@pytest.mark.slow
def test_the_first_call(tmp_path, capfd):
    """``check`` together with ``smoke``, then ``bench``."""
    assert run("first", tmp_path) == 0
    checked = list(read(tmp_path / "check.jsonl"))
    assert {line["operator"] for line in checked} == set(ops.NAMES)
    assert not any(line["failure"] for line in checked)
    smoked = list(read(tmp_path / "smoke.jsonl"))
    assert [line["step"] for line in smoked] == list(smoke.STEPS)
    assert all(line["passed"] for line in smoked)
    rows = list(read(tmp_path / "gpu.jsonl"))[2:]
    assert {row["operator"] for row in rows} == {"lookup", "pack"}
    said = capfd.readouterr().out
    assert all(f"{part} passed" in said for part in ("check", "smoke", "bench"))


@WITHOUT_TRITON
@pytest.mark.slow
def test_the_second_call(tmp_path, capfd):
    """``tune``, then ``counters``. On the CPU's own backend the launch table changes nothing, but all of it runs."""
    assert run("second", tmp_path) == 0
    tuned = list(read(tmp_path / "tune.jsonl"))
    assert len({line["shape"] for line in tuned}) == 5
    assert sum(line["current"] for line in tuned) == 5
    assert len(tuned) == 10
    assert all(line["failure"] == "" and line["seconds"] > 0 for line in tuned)
    counted = list(read(tmp_path / "counters.jsonl"))
    assert {line["workload"] for line in counted} == set(counters.WORKLOADS)
    said = capfd.readouterr().out
    assert "tune passed" in said
    assert "a CPU has no such counters" in said


@pytest.mark.compiled
@WITHOUT_TRITON
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: kernels are interpreted, not compiled")
def test_an_entry_is_what_searches_are_launched_with():
    from benchmarks.gpu_day import launch_table
    from benchmarks.triton_static.offline import compiling_for
    from kvb.kernels import launch

    for D in (8, 14, 64, 128):
        with compiling_for("sm_90") as kernels:
            entries = launch_table.candidates(CPU, D)
            assert entries[0] == launch_table.current(CPU, D)
            assert len(set(entries)) == len(entries)
            keys = torch.empty(2, 5000, D, device="meta")
            packed = torch.empty(2, launch.packed_nbytes(5000, D, keys.dtype), dtype=torch.uint8, device="meta")
            queries = torch.empty(4096, 1, 2, D, device="meta")
            chosen = entries[1:3]
            for entry in chosen:
                with launch_table.replaced(CPU, D, entry):
                    launch.nearest(queries, keys, packed, None, 1)
            assert launch_table.current(CPU, D) == entries[0]
        found = [
            (kernel.constants["BN"], kernel.constants["BK"], kernel.num_warps, kernel.metadata.num_stages)
            for kernel in kernels
            if {"BN", "BK", "BOOKS"} <= set(kernel.constants)
        ]
        assert found == [tuple(entry) for entry in chosen]


# --- smoke ------------------------------------------------------------------------------------------------------------


def test_wrong_choices_are_counted():
    q, k = torch.randn(40, 1, 3, 6), torch.randn(3, 50, 6)
    found, distances = functional.nearest(q, k)
    assert smoke.wrong_choices(q, k, found, distances) == 0
    other = found.clone()
    other[:7, 0, 1] = (other[:7, 0, 1] + 1) % 50
    there = (q - k[torch.arange(3), other]).square().sum(-1)
    assert smoke.wrong_choices(q, k, other, there) == 7
    assert smoke.wrong_choices(q, k, found, distances * (1 + 1e-4)) == distances.numel()


BROKEN = {
    "exactness": lambda right: lambda *a, **o: tuple(part.flip(0) for part in right(*a, **o)),
    "twins": lambda right: lambda *a, **o: tuple(part.flip(-1) for part in right(*a, **o)),
}


@pytest.mark.parametrize("step", BROKEN)
def test_a_wrong_search_fails_its_step(step, day, monkeypatch):
    monkeypatch.setattr(functional, "nearest", BROKEN[step](functional.nearest))
    (facts,) = smoke._run(day, [step])
    assert not facts["passed"]
    assert facts["says"].startswith("WrongResult: ")


def test_a_step_that_raises_does_not_stop_the_next(day, monkeypatch, capsys):
    def broken(day):
        raise ZeroDivisionError("in a step")

    monkeypatch.setitem(smoke.STEPS, "repeat", broken)
    assert smoke.steps(day, ["repeat", "autocast"]) == 1
    first, second = read(day.out / "smoke.jsonl")
    assert (first["step"], first["passed"], first["says"]) == ("repeat", False, "ZeroDivisionError: in a step")
    assert (second["step"], second["passed"]) == ("autocast", True)


def test_a_step_that_breaks_the_device_costs_a_process(day, monkeypatch):
    """The processes are played by this one."""
    lost = []

    def broken(day):
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def start(self, line):
        lost.clear()
        return smoke.steps(day, line[line.index("--only") + 1 :])

    monkeypatch.setitem(smoke.STEPS, "repeat", broken)
    monkeypatch.setattr(smoke, "device_is_lost", lambda device: bool(lost))
    monkeypatch.setattr(Day, "start", start)
    monkeypatch.setattr(smoke, "finish", lambda statuses, seconds: statuses)
    assert smoke.main(day, ["autocast", "repeat", "twins"]) == 1
    assert [(line["step"], line["passed"]) for line in read(day.out / "smoke.jsonl")] == [
        ("autocast", True),
        ("repeat", False),
        ("twins", True),
    ]


def test_a_process_that_crashes_is_one_failed_step(day, monkeypatch):
    def start(self, line):
        names = line[line.index("--only") + 1 :]
        if names[0] == "repeat":
            return -11
        smoke.steps(day, names[:1])
        return LOST

    monkeypatch.setattr(Day, "start", start)
    monkeypatch.setattr(smoke, "finish", lambda statuses, seconds: statuses)
    assert smoke.main(day, ["autocast", "repeat", "twins"]) == 1
    _, failed, _ = read(day.out / "smoke.jsonl")
    assert failed == {"step": "repeat", "passed": False, "says": "the process ended with status -11"}


# --- time, and what is not there --------------------------------------------------------------------------------------


def test_what_runs_too_long_is_killed_and_what_it_found_is_there(tmp_path):
    file = tmp_path / "found.jsonl"
    Journal(file)
    source = f"from benchmarks.journal import Journal; import pathlib, time\nJournal(pathlib.Path({str(file)!r}), True)"
    source += ".write({'a': 1}); print('ready', flush=True); time.sleep(600)"
    process = Day(tmp_path, CPU, True, 600.0).start([sys.executable, "-c", source])
    while not list(read(file)):
        assert process.poll() is None
    assert finish([process], 0.0) == [None]
    assert process.poll() is not None
    assert list(read(file)) == [{"a": 1}]


def test_a_budget_that_is_used_up(tmp_path, capsys):
    day = Day(tmp_path, CPU, small=True, budget=-1.0)
    assert smoke.steps(day, ["autocast"]) == 1
    assert [line["says"] for line in read(tmp_path / "smoke.jsonl")] == ["no time left"]


def test_without_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(["first", "--out", str(tmp_path / "out")])
    assert stopped.value.code == "benchmarks.gpu_day needs a CUDA or HIP device, and torch finds none here"
    assert not (tmp_path / "out").exists()


NCU = """==PROF== Connected to process 1
==PROF== Profiling "search" - 0: 0%....50%....100% - 11 passes
"ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed.sum","dram__bytes_read.sum","Block Size"
"","","us","inst","Mbyte",""
"0","search","53.1","1,234","41.9","(128, 1, 1)"
"1","settle","3.0","77","1.2","(128, 1, 1)"
"""


def test_what_ncu_says_is_read():
    first, second = counters.parse_ncu(NCU)
    assert first == {"kernel": "search", "time": "53.1 us", "instructions": "1,234 inst", "bytes read": "41.9 Mbyte"}
    assert second["kernel"] == "settle"
    assert counters.parse_ncu("==ERROR== ERR_NVGPUCTRPERM - no permission") == []


def test_without_counters_there_are_times(day, monkeypatch, capsys):
    """ncu is not there, and CUPTI may not count: both are said, once, and times are taken."""
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    by_profiler = counters.by_profiler

    def without_counters(day, name, metrics):
        if metrics:
            raise RuntimeError("CUPTI counted nothing: it may need administrator rights")
        cpu = Day(day.out, CPU, True, 600.0)
        return by_profiler(cpu, name, metrics)

    monkeypatch.setattr(counters, "by_profiler", without_counters)
    day.device = torch.device("cuda")
    assert counters.main(day) == 0
    lines = list(read(day.out / "counters.jsonl"))
    assert [(line["way"], line["failure"]) for line in lines if "failure" in line] == [
        ("ncu", "RuntimeError: ncu is not installed"),
        ("CUPTI", "RuntimeError: CUPTI counted nothing: it may need administrator rights"),
    ]
    assert {line["workload"] for line in lines if "us" in line} == set(counters.WORKLOADS)
