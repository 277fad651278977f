"""Runs the PTX that Triton compiles, on CPU tensors, and notices what is wrong with it: see README.md."""

from emulator.launcher import Emulation, emulating
from emulator.program import Unsupported
from emulator.state import Fault, Note, Report

__all__ = ["Emulation", "Fault", "Note", "Report", "Unsupported", "emulating"]
