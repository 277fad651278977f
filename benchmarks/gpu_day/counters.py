"""What the hardware counted in the kernels that take the time: with ncu, else with CUPTI behind torch.profiler.

Counters need rights that a rented machine may not give. It says what cannot be had and takes the next best: at
the end of the line are the times of kernels, or of operators on a CPU.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import small
from benchmarks.gpu_day.day import ROOT, Day
from benchmarks.journal import Journal
from benchmarks.shapes import GPU
from benchmarks.suites import on_device
from benchmarks.timing import Attempt

# Each by the kernel that it is about.
WORKLOADS: dict[str, tuple[str, Callable[[on_device.Problem], on_device.Work]]] = {
    "search": ("paper-8k", on_device.search),
    "resident": ("seed", on_device.search),
    "add_by_product": ("seed", on_device.backward),
}
METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "of peak: multiprocessors",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "of peak: memory",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "of peak: L2 cache",
    "sm__inst_executed.sum": "instructions",
    "sm__inst_executed_pipe_alu.sum": "of these ALU",
    "sm__inst_executed_pipe_fma.sum": "of these FMA",
    "sm__inst_executed_pipe_tensor.sum": "of these tensor",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "of peak: issue",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "active warps",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "launch__registers_per_thread": "registers per thread",
}
CUPTI = ("kineto__tensor_core_insts", "dram__bytes_read.sum", "dram__bytes_write.sum", "sm__inst_executed.sum")


def run_workload(day: Day, name: str) -> Callable[[], Any]:
    """The calls of a workload, with everything prepared and compiled."""
    shape, work = WORKLOADS[name]
    size = small(GPU[shape]) if day.small else GPU[shape]
    with torch.no_grad():
        run = work(on_device.problem(size, day.device, with_values=True)).kvb.run
        run()
    return run


def by_ncu(day: Day, name: str) -> list[dict[str, Any]]:
    """One row per launch, from a process of its own.

    Raises:
        RuntimeError: ncu is not installed, or may not count.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("ncu is not installed")
    command = [ncu, "--csv", "--page", "raw", "--metrics", ",".join(METRICS), "--profile-from-start", "off"]
    part = day.command("workload", day.left, "--only", name)
    try:
        done = subprocess.run([*command, *part], cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, day.left))
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"ncu took more than {late.timeout:.0f} s") from late
    rows = parse_ncu(done.stdout)
    if not rows:
        raise RuntimeError(f"ncu counted nothing: {(done.stdout + done.stderr).strip()[-300:]}")
    return rows


def parse_ncu(text: str) -> list[dict[str, Any]]:
    """The rows of ncu's raw page: kernels, and what was counted, in our words and its units."""
    table = [line for line in text.splitlines() if line.startswith('"')]
    lines = list(csv.reader(table))
    if len(lines) < 3:
        return []
    names, units = lines[0], lines[1]
    found = []
    for values in lines[2:]:
        row = dict(zip(names, values, strict=False))
        counted = {
            METRICS[metric]: f"{row[metric]} {units[names.index(metric)]}".strip()
            for metric in METRICS
            if row.get(metric)
        }
        found.append({"kernel": row.get("Kernel Name", "?"), **counted})
    return found


def by_profiler(day: Day, name: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row per kernel, or per operator on a CPU: times, or with ``metrics`` CUPTI's counters.

    Raises:
        RuntimeError: CUPTI may not count.
    """
    run, cuda = run_workload(day, name), day.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    options: dict[str, Any] = {"activities": [activity.CUDA if cuda else activity.CPU]}
    if metrics:
        settings = {"profiler_metrics": list(metrics), "profiler_measure_per_kernel": True}
        options["experimental_config"] = torch._C._profiler._ExperimentalConfig(**settings)
    with torch.profiler.profile(**options) as profiler, torch.no_grad():
        for _ in range(1 if metrics else 5):
            run()
        if cuda:
            torch.cuda.synchronize()
    if metrics:
        return _counted(profiler, metrics)
    averages = sorted(profiler.key_averages(), key=lambda one: one.device_time_total if cuda else one.cpu_time_total)
    return [
        {"kernel": one.key, "calls": one.count, "us": one.device_time if cuda else one.cpu_time}
        for one in reversed(averages[-8:])
    ]


def _counted(profiler: torch.profiler.profile, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """CUPTI's counters stand in the trace only, in events of their own."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = []
    for event in events:
        counted = {metric: event["args"][metric] for metric in metrics if metric in event.get("args", {})}
        if counted:
            found.append({"kernel": event["name"], **counted})
    if not found:
        raise RuntimeError("CUPTI counted nothing: it may need administrator rights")
    return found


def main(day: Day) -> int:
    """Every workload, with the best way that works; never a failure."""
    journal = Journal(day.out / "counters.jsonl")
    ways: dict[str, Callable[[str], list[dict[str, Any]]]] = {
        "ncu": lambda name: by_ncu(day, name),
        "CUPTI": lambda name: by_profiler(day, name, CUPTI),
        "times only": lambda name: by_profiler(day, name, ()),
    }
    if day.device.type == "cpu":
        del ways["ncu"], ways["CUPTI"]
        print("a CPU has no such counters: times of operators only", flush=True)
    for name in WORKLOADS:
        for way in list(ways):
            if day.left < 5:
                print(f"{name}: no time left", flush=True)
                break
            rows: list[dict[str, Any]] = []
            with Attempt() as attempt:  # drivers and profilers fail in ways of their own
                rows = ways[way](name)
            if attempt.error:
                print(f"{name}: no counters from {way}: {attempt.error_line}", flush=True)
                journal.write({"workload": name, "way": way, "failure": attempt.error_line})
                if len(ways) > 1:
                    del ways[way]  # it will not come back for the next workload
                continue
            for row in rows:
                journal.write({"workload": name, "way": way, **row})
                print(f"{name} ({way}): {row}", flush=True)
            break
    return 0


def workload(day: Day, name: str) -> int:
    """What ncu watches: one call, between the marks that it waits for."""
    run = run_workload(day, name)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with torch.no_grad():
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0
