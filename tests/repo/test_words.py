"""The language of sentences that users and contributors read: phrases that are no English here."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDINGS = {".py", ".md", ".h", ".cpp", ".inc", ".ipynb"}
THINGS, PLACES = "rows|keys|queries|bytes|numbers|epochs|threads", "row|codebook|head|sample|query|task|thread"
# Each with what to write instead.
BANNED = {
    r"\banew\b": "again",
    r"\bany more\b": "no longer",
    r"\bhow to mend\b": "how to fix",
    r"\bthe (keys|pairs|values|codes) there are\b": "the current ...",
    r"\bwho answers\b": "which backend runs",
    rf"\b({THINGS}) a ({PLACES})\b": "... per ...",
}


def sources() -> list[Path]:
    rooms = ("kvb", "kernels", "csrc", "benchmarks", "docs", "tests")
    inside = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in ENDINGS]
    kept = [path for path in inside if path != Path(__file__) and (ROOT / "tests" / "data") not in path.parents]
    return [*kept, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"))]


def test_nothing_is_written_that_no_reader_would_say():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}, write {instead!r}"
        for path in sources()
        for phrase, instead in BANNED.items()
        for match in re.finditer(phrase, path.read_text(), re.IGNORECASE)
    ]
    assert not found, "\n".join(found)
