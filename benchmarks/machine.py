"""What this machine is, as every report says it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import kvb
from kvb import ops

MEMORY = Path("/proc/meminfo")
CPU = torch.device("cpu")


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


def slug(device: torch.device = CPU) -> str:
    """The machine as part of a file's name: its processor, without what every processor has in its name."""
    if device.type != "cpu":
        return "-".join(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    words = re.sub(r"\((?:r|tm)\)|\b(?:cpu|processor)\b|@.*", " ", cpu_name().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", words), f"{os.cpu_count()}-cpus"])


def device_facts(device: torch.device) -> dict[str, str]:
    """What computes: the name of a device and its platform, besides the versions."""
    name = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    platform = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return {"machine": name, "platform": platform, "backend": ops.backend(device.type), **kvb.info()}


def available_bytes(device: torch.device = CPU) -> int:
    """Memory that a process can still take without swapping, or that is free on a device."""
    if device.type != "cpu":
        torch.cuda.empty_cache()  # what PyTorch only keeps for itself is free
        return torch.cuda.mem_get_info(device)[0]
    try:
        (kilobytes,) = re.findall(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text())
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1024 * int(kilobytes)


def load() -> float:
    """How many processes computed in the last minute, on average."""
    return os.getloadavg()[0]
