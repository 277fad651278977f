"""The C++ sources: short files, short functions, and names that mean one thing."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
FILES = sorted(path for path in SOURCES.glob("**/*") if path.suffix in (".h", ".cpp", ".inc"))
# What each instruction set defines again, and what each filter says of itself.
PER_INSTRUCTION_SET = {"lanes128.inc", "lanes256.inc", "lanes512.inc"}
PER_INSTRUCTION_SET |= {"avx2.cpp", "avx512.cpp", "avx512_vnni.cpp", "avx_vnni.cpp", "neon.cpp", "neon_dot.cpp"}


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCES))


def functions(text: str) -> list[tuple[str, int]]:
    """Each outermost function body or class member, with how many lines it has: by indentation, as all is formatted."""
    found, lines = [], text.splitlines()
    for indent in ("", "  "):
        start = None
        for number, line in enumerate(lines):
            if start is None and re.match(
                rf"{indent}[^\s/#}}].*\) ?(const )?(: .*)?{{$|{indent}[^\s/#}}].*\) (const )?{{$", line
            ):
                start = number
            elif start is not None and line.startswith(indent + "}"):
                found.append((lines[start].strip(), number - start + 1))
                start = None
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_functions_and_lines_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    assert not [line for line in text.splitlines() if len(line) > 120]
    assert not [(name, length) for name, length in functions(text) if length > 60]


def test_the_length_of_functions_is_seen():
    long = "int f(int a) {\n" + "  a += 1;\n" * 70 + "}\n"
    member = "class A {\n  int g() const {\n" + "    a();\n" * 65 + "  }\n};\n"
    assert functions(long) == [("int f(int a) {", 72)]
    assert functions(member) == [("int g() const {", 67)]
    assert any(functions(path.read_text()) for path in FILES)


def test_no_constant_or_type_has_two_meanings():
    names: Counter[str] = Counter()
    for path in FILES:
        if path.name in PER_INSTRUCTION_SET:
            continue
        text = path.read_text()
        constants = re.findall(r"^constexpr [\w:]+ (\w+) =", text, re.M)
        constants += re.findall(r"^constexpr [\w:]+ \w+ = [^;]*?, (\w+) = [^;]*;", text, re.M)
        types = re.findall(r"^(?:struct|class)(?: alignas\(\w+\))? (\w+)\b(?=[^;]*{)", text, re.M)
        assert not [name for name in constants if not re.match(r"k[A-Z]", name)], path.name
        names.update(constants + types)
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) > 60


# What the headers of the oldest PyTorch that builds the extension lack, though newer ones have it for that target too.
NEWER = r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_oldest_headers_have_what_is_called(path):
    assert not re.search(NEWER, path.read_text())


VAGUE = r"\b(?:kUnit|kCached|kAround|kNear|kKept|kBeside|Touched|Step|Codebook)\b"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_numbers_are_explained_where_they_stand(path):
    """Every constant that is a number has a comment: on its line, or above the group that it stands in."""
    lines = path.read_text().splitlines()
    assert not re.search(VAGUE, path.read_text())
    for number, line in enumerate(lines):
        if not re.match(r"\s*(?:static )?constexpr [\w:]+ k[A-Z]\w* ?= ?[\d.-]", line) or "//" in line:
            continue
        above = number - 1
        while "constexpr" in lines[above] and "//" not in lines[above]:
            above -= 1
        assert "//" in lines[above], f"{path.name}:{number + 1}: {line.strip()}"
