"""A file of JSON lines that grows line by line: a run that is cut off loses nothing that it has found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Starts an empty file, or goes on with what is there; every ``write`` is on disk when it returns."""

    def __init__(self, path: Path, go_on: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a" if go_on else "w").close()

    def write(self, facts: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(facts) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, none if there is no file; the last one may have been cut off, and is left out then."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
