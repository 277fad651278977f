"""What a study gives, and the files that it becomes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kvb.experiments import plots
from kvb.experiments.plots import Panel
from kvb.experiments.versions import versions

Say = Callable[[str], None]


class Found(NamedTuple):
    """What a study gives: its records, a table, and what to draw: panels, or images by the name of the model."""

    records: list[dict[str, Any]]
    table: str
    panels: list[Panel]
    images: Mapping[str, Tensor] | None = None


def aloud(line: str) -> None:
    """Print a line as soon as it is known."""
    print(line, flush=True)


def write(path: Path, about: Mapping[str, Any], title: str, study: Callable[[], Found], say: Say) -> Found:
    """Run a study; writes ``path``.json with ``about``, .md with the table, and a figure as .png."""
    begun = time.perf_counter()
    found = study()
    save(path, about, {"records": found.records}, title, found, begun, say)
    return found


def save(
    path: Path, about: Mapping[str, Any], records: Mapping[str, Any], title: str, found: Found, begun: float, say: Say
) -> None:
    """The same of a study that has run since ``begun``, with its records by name."""
    record = {**about, "versions": versions(), **records}
    path.with_name(path.name + ".json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    path.with_name(path.name + ".md").write_text(found.table + "\n")
    picture = path.with_name(path.name + ".png")
    if found.images is None:
        plots.panels(found.panels, title=title, path=picture)
    else:
        plots.images(found.images, title=title, path=picture)
    say(f"\nWritten: {path}.json, .md and .png\nTook {time.perf_counter() - begun:.0f} s.")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
