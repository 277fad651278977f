"""The structure of the package, kept by reading its source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kvb"
# A file imports from strictly lower floors only; inside a room with one entry, in any direction that makes no circle.
FLOORS = {
    "__main__": 10,
    "experiments": 9,
    "__init__": 8,
    "compat": 7,
    "optim": 7,
    "modules.discrete": 6,
    "modules.encoders": 6,
    "optim_audit": 6,
    "training": 6,
    "unlearning": 6,
    "modules.bottleneck": 5,
    "data": 4,
    "modules.key_learning": 4,
    "splitters": 4,
    "decoders": 4,
    "functional": 3,
    "about": 2,
    "testing": 2,
    "ops": 1,
    "checkpoints": 0,
    "collectives": 0,
    "modules": 0,
    "modules.backbones": 0,
    "validation": 0,
    "reference": 0,
}
FILES = sorted(path for path in PACKAGE.glob("**/*.py") if "kernels" not in path.parts)
# The same for the kernels, which import nothing else of kvb.
KERNEL_FLOORS = {
    "launch": 6,
    "launch_keys": 5,
    "launch_search": 4,
    "launch_training": 4,
    "launch_values": 3,
    "scatter": 2,
    "update": 2,
    "pack": 1,
    "resident": 1,
    "scan": 1,
    "search": 1,
    "values": 1,
    "device": 0,
    "scores": 0,
}
KERNELS = sorted((PACKAGE.parent / "kernels").glob("**/*.py"))
WITHOUT_TRITON_LANGUAGE = {"launch", "launch_keys", "launch_search", "launch_training", "launch_values", "device"}


def place(module: str) -> str:
    """The entry of ``FLOORS`` that a module stands for: its own, or its room's."""
    inner = module.removeprefix("kvb").removeprefix(".") or "__init__"
    return inner if inner in FLOORS else inner.split(".")[0]


def floor(module: str) -> int:
    return FLOORS[place(module)]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> set[str]:
    """The modules of kvb that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "kvb"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module and node.module.split(".")[0] == "kvb":
                within = node.module.removeprefix("kvb").removeprefix(".")
                names = [f"{within}.{alias.name}".removeprefix(".") for alias in node.names]
                found |= {f"kvb.{name}" if name in FLOORS else node.module for name in names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    here = name_of(path)
    for target in imports(path):
        same_room = any(here.startswith(room) and target.startswith(room) for room in ("kvb.experiments", "kvb.compat"))
        assert same_room or floor(target) < floor(here), f"{here} imports {target}"


def test_every_file_has_a_floor_and_a_first_sentence():
    for path in FILES:
        assert place(name_of(path)) in FLOORS, path.name
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


def kernel_imports(path: Path) -> set[str]:
    """The modules of kvb.kernels that one of them imports; any other module of kvb fails."""
    found = set()
    for target in imports(path):
        assert re.match(r"kvb\.kernels\b", target), f"{path.name} imports {target}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "kvb.kernels":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvb.kernels."):
            found.add(node.module.split(".")[2])
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_imports_of_kernels_point_down(path):
    for target in kernel_imports(path):
        assert KERNEL_FLOORS[target] < KERNEL_FLOORS[path.stem], f"{path.name} imports {target}"


def test_every_kernel_file_has_a_floor_and_a_first_sentence():
    assert {path.stem for path in KERNELS} == set(KERNEL_FLOORS)
    for path in KERNELS:
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_compute_and_launchers_launch(path):
    source = path.read_text()
    if path.stem in WITHOUT_TRITON_LANGUAGE:
        assert not re.search(r"\btl\.|\btriton\.jit\b", source), f"{path.name} computes"
    else:
        assert not re.search(r"\bnum_(warps|stages)\b|\bgrid\b|\bimport torch\b", source), f"{path.name} launches"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_reductions_are_the_ones_that_every_version_of_triton_has(path):
    """An argmin shuffles pairs between threads; minima of a place among equals do not."""
    found = re.findall(r"\btl\.(?:arg\w+|reduce|sort|topk|associative_scan)\b|return_indices", path.read_text())
    assert not found, f"{path.name} holds {found[0]}"


@pytest.mark.parametrize("path", [*FILES, *KERNELS], ids=lambda path: ".".join(path.parts[-2:]))
def test_nothing_dangerous_and_nothing_silent(path):
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}: assert disappears under -O"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__"), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.ExceptHandler):
            assert isinstance(node.type, ast.Name), f"{path.name}:{node.lineno}: name one exception"
            assert node.type.id not in ("Exception", "BaseException"), f"{path.name}:{node.lineno}"
    for banned in ("pickle.load", "urllib", "requests."):
        assert banned not in source, f"{path.name}: {banned}"
    assert "os.environ" not in source or path.name == "ops.py"


def test_each_kind_of_line_lives_in_its_room():
    rooms = {
        r"torch\.library|save_for_backward": {"ops"},
        r"register_buffer|nn\.Parameter": {"modules", "splitters", "decoders", "compat"},
        r"\btl\.": set(),
        r"perf_counter|time\.time": {"experiments"},
    }
    for path in FILES:
        room = name_of(path).split(".")[1]
        for pattern, allowed in rooms.items():
            if re.search(pattern, path.read_text()):
                assert room in allowed, f"{path.name} holds {pattern}"


def test_every_operator_has_a_reference_a_fake_and_a_schema():
    from kvb import ops, reference

    for name in ops.NAMES:
        assert callable(getattr(reference, name))
        assert callable(getattr(ops, f"_fake_{name}"))
        assert getattr(reference, name).__doc__


def test_every_public_name_is_documented():
    import kvb

    for name in kvb.__all__:
        assert getattr(kvb, name).__doc__, name
    for name in ("pack_keys", "nearest", "sample", "gather", "lookup"):
        document = getattr(kvb.functional, name).__doc__
        assert "Args:" in document
        assert "Returns:" in document
        assert "Raises:" in document
