"""What this machine is, as every report says it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import kvb

MEMORY = Path("/proc/meminfo")


def cpu_name() -> str:
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def facts() -> dict[str, str]:
    return {
        "machine": f"{cpu_name()}, {os.cpu_count()} logical CPUs, {platform.system()}",
        "faiss-cpu": version("faiss-cpu"),
        "threads": str(torch.get_num_threads()),
        "KVB_CPU_CAPABILITY": os.environ.get("KVB_CPU_CAPABILITY", "not set"),
        **kvb.info(),
    }


def slug() -> str:
    """The machine as part of a file's name: its processor, without what every processor has in its name."""
    words = re.sub(r"\((?:r|tm)\)|\b(?:cpu|processor)\b|@.*", " ", cpu_name().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", words), f"{os.cpu_count()}-cpus"])


def available_bytes() -> int:
    """Memory that a process can still take without swapping."""
    try:
        (kilobytes,) = re.findall(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text())
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1024 * int(kilobytes)


def load() -> float:
    """How many processes computed in the last minute, on average."""
    return os.getloadavg()[0]
