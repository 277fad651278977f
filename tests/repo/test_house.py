"""The structure of the package, kept by reading its source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "kvb"
# A file imports from strictly lower floors only; inside a room with one entry, in any direction that makes no circle.
FLOORS = {
    "__main__": 13,
    "experiments": 12,
    "__init__": 11,
    "compat": 10,
    "distributed": 10,
    "loading": 10,
    "report": 10,
    "plots": 7,
    "integrations": 10,
    "integrations.tensorboard": 9,
    "modules.pretrained": 9,
    "distributed.steps": 3,
    "modules.discrete": 8,
    "modules.encoders": 8,
    "optim": 8,
    "optim_audit": 7,
    "optim_growth": 7,
    "optim_clip": 6,
    "optim_gradients": 5,
    "optim_groups": 6,
    "optim_rows": 7,
    "training": 7,
    "unlearning": 7,
    "modules.wrapping": 7,
    "modules.bottleneck": 6,
    "modules.tables": 5,
    "modules.datasets": 5,
    "modules.learning": 5,
    "modules.modes": 4,
    "data": 4,
    "modules.key_learning": 4,
    "splitters": 4,
    "decoders": 4,
    "counting": 3,
    "projection": 4,
    "tabular": 2,
    "classifier": 8,
    "classifier_files": 7,
    "growth": 7,
    "memory": 5,
    "functional": 3,
    "modules.state": 3,
    "modules.outputs": 4,
    "modules.entries": 2,
    "modules.hub": 3,
    "modules.adapters": 1,
    "about": 2,
    "modules.packed_keys": 2,
    "modules.positions": 1,
    "modules.fully_sharded": 0,
    "testing.__main__": 6,
    "testing": 5,
    "testing.runner": 4,
    "testing.verdicts": 3,
    "testing.checks": 2,
    "testing.expectations": 1,
    "testing.memory_checks": 1,
    "testing.cases": 0,
    "testing.attempts": 0,
    "testing.data": -1,
    "ops": 1,
    "collectives": 0,
    "checkpoints": 1,
    "items": 1,
    "npy": 1,
    "files": 0,
    "safetensors_format": 0,
    "modules": 0,
    "modules.backbones": 0,
    "modules.legacy": 0,
    "modules.recomputation": 0,
    "modules.streams": 2,
    "modules.seeding": 2,
    "modules.samples": 1,
    "bars": 0,
    "modules.key_report": 1,
    "validation": 0,
    "reference": 0,
    "reference.search": -1,
    "reference.histograms": -2,
    "reference.statistics": -1,
    "reference.memory": -1,
    "reference.packing": -2,
    "reference.values": -2,
    "reference.arithmetic": -3,
    "reference.shared": -3,
    "_torch": -4,
}
ROOMS = ("kvb.compat", "kvb.distributed", "kvb.experiments", "kvb.ops", "kvb.reference", "kvb.testing")
FILES = sorted(path for path in PACKAGE.glob("**/*.py") if "kernels" not in path.parts)
# The same for the kernels, which import little else of kvb: private parts of PyTorch, and a check of many tensors.
BELOW_KERNELS = {"kvb._torch", "kvb.reference.shared", "kvb.reference.statistics"}
KERNEL_FLOORS = {
    "launch": 8,
    "launch_search": 7,
    "launch_training": 7,
    "launch_keys": 6,
    "launch_statistics": 6,
    "launch_values": 6,
    "launch_filter": 5,
    "launch_scan": 5,
    "launch_shared": 5,
    "statistics": 5,
    "launch_pack": 4,
    "scatter": 4,
    "update": 4,
    "pack": 3,
    "resident": 3,
    "scan": 3,
    "search": 3,
    "values": 3,
    "rows": 2,
    "scores": 2,
    "launcher": 1,
    "layout": 1,
    "launch_table": 0,
    "named": 0,
    "device": 0,
}
# Arguments of kernels that are numbers.
NUMBERS = {
    *("rows", "cells", "count", "N", "S", "C", "K", "T", "R", "steps", "slices", "splits", "per_split", "workers"),
    *("capacity", "stride_b", "stride_s", "stride_c", "x_b", "x_s", "x_c", "x_v", "i_b", "i_s", "i_c"),
}
KERNELS = sorted((PACKAGE.parent / "kernels").glob("**/*.py"))
WITHOUT_TRITON_LANGUAGE = {
    *(name for name in KERNEL_FLOORS if name.startswith("launch")),
    *("rows", "layout", "device"),
}


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
        same_room = any(here.startswith(room) and target.startswith(room) for room in ROOMS)
        assert same_room or floor(target) < floor(here), f"{here} imports {target}"


def test_imports_inside_a_room_make_no_circle():
    files = {name_of(path): path for path in FILES}
    below = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(files)
                below[name] |= inner or {node.module}
    while below:
        lowest = {name for name, targets in below.items() if not targets & set(below)}
        assert lowest, f"these import one another: {sorted(below)}"
        below = {name: targets for name, targets in below.items() if name not in lowest}


def private_names(source: str) -> set[str]:
    """Attributes of PyTorch, of tensors and of modules of PyTorch that are none of its public interface."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            of_torch = isinstance(root, ast.Name) and root.id in ("torch", "nn", "forward_ad")
            if of_torch or node.attr in PRIVATE_OF_TENSORS:
                found.add(node.attr)
        elif isinstance(node, ast.Attribute) and re.match(r"torch\.(\w+\.)*_[^_]", ast.unparse(node)):
            found.add(ast.unparse(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {module for module in modules if re.match(r"torch\.(\w+\.)*_[^_]", module)}
            if (getattr(node, "module", None) or "").split(".")[0] == "torch":
                found |= {alias.name for alias in node.names if re.match(r"_[^_]", alias.name)}
    return found


PRIVATE_OF_TENSORS = {name for name in dir(torch.Tensor) if re.match(r"_[^_]", name)}


@pytest.mark.parametrize("path", [*FILES, *KERNELS], ids=lambda path: ".".join(path.parts[-2:]))
def test_private_names_of_torch_are_in_one_file(path):
    assert path.name == "_torch.py" or not private_names(path.read_text())


def test_private_names_are_seen():
    for source, name in (
        ("torch._assert_async(x)", "_assert_async"),
        ("torch.utils._pytree.tree_map(f, x)", "torch.utils._pytree.tree_map"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree"),
        ("from torch import _C", "_C"),
        ("import torch._dynamo", "torch._dynamo"),
        ("keys._version", "_version"),
    ):
        assert name in private_names(source)
    assert not private_names("import torch\nself._packed = torch.nn.functional.pad(x.__class__, 1)")


def test_every_file_has_a_floor_and_a_first_sentence():
    for path in FILES:
        assert place(name_of(path)) in FLOORS, path.name
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


def kernel_imports(path: Path) -> set[str]:
    """The modules of kvb.kernels that one of them imports; a module of kvb beyond those BELOW_KERNELS fails."""
    found = set()
    for target in imports(path) - BELOW_KERNELS:
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


def kernel_functions(path: Path) -> list[ast.FunctionDef]:
    """The kernels of a file, without the functions that they call."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if any("kernel(" in ast.unparse(mark) for mark in node.decorator_list)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_say_what_their_pointers_lead_to(path):
    lines = path.read_text().splitlines()
    for function in kernel_functions(path):
        for argument in function.args.args:
            number = argument.annotation is not None or argument.arg in NUMBERS
            said = re.search(r"#.*\[.*\]", lines[argument.lineno - 1])
            assert number or said, f"{path.name}: {function.name}: {argument.arg} without its shape"


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
    assert "os.environ" not in source or path.name in ("backends.py", "shares.py")  # of users, and of torchrun


def test_each_kind_of_line_lives_in_its_room():
    rooms = {
        r"torch\.library|save_for_backward": {"ops"},
        r"register_buffer|nn\.Parameter": {
            *("modules", "splitters", "decoders", "counting", "projection", "memory", "compat", "distributed")
        },
        r"\btl\.": set(),
        r"perf_counter|time\.time|time\.monotonic": {"experiments", "testing"},
        r"torch\.manual_seed": {"experiments", "testing"},
    }
    for path in FILES:
        room = name_of(path).split(".")[1]
        for pattern, allowed in rooms.items():
            if re.search(pattern, path.read_text()):
                assert room in allowed, f"{path.name} holds {pattern}"


# What the tree does in one place, and the only files that may.
ONCE = {
    r"\b(?:perf_counter|process_time|monotonic|enable_timing)\b": ("benchmarks", ["timing.py"]),
    r"except Exception\b|isinstance\(error, Exception\)": ("benchmarks", []),
    r"torch\.manual_seed|fork_rng": ("kvb/experiments", ["seeding.py"]),
}


@pytest.mark.parametrize("pattern", ONCE)
def test_one_timer_one_attempt_one_way_to_seed(pattern):
    folder, files = ONCE[pattern]
    found = [path.name for path in (PACKAGE.parent / folder).glob("**/*.py") if re.search(pattern, path.read_text())]
    assert sorted(found) == files


def test_kinds_of_data_are_defined_once():
    from kvb.testing import DATA, MEMORY

    for path in (PACKAGE.parent / "tests").glob("**/*.py"):
        for node in ast.parse(path.read_text()).body:
            assert not isinstance(node, ast.FunctionDef) or node.name not in DATA | MEMORY, f"{path.name}: {node.name}"


def test_every_operator_has_a_reference_a_fake_and_a_schema():
    from kvb import ops, reference
    from kvb.ops import schemas

    for name in ops.NAMES:
        assert callable(getattr(reference, name))
        assert callable(getattr(schemas, name))
        assert getattr(reference, name).__doc__


def test_every_public_name_is_documented():
    import kvb

    for name in dir(kvb):
        folder = name == "kernels"  # imported by other tests, and described by its README
        assert name.startswith("_") or folder or getattr(kvb, name).__doc__, name
    for name in ("pack_keys", "nearest", "sample", "gather", "lookup"):
        document = getattr(kvb.functional, name).__doc__
        assert "Args:" in document
        assert "Returns:" in document
        assert "Raises:" in document


LONGEST_FILE, LONGEST_FUNCTION, LONGEST_KERNEL = 450, 60, 100
ROOT = PACKAGE.parent


def too_long(name: str, source: str) -> list[str]:
    """The file, and functions of it, that are longer than they may be."""
    found = [name] if source.count("\n") > LONGEST_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marks = [ast.unparse(one) for one in node.decorator_list]
            kernel = any(mark.startswith(("triton.jit", "kernel(")) for mark in marks)
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            if node.end_lineno - first + 1 > (LONGEST_KERNEL if kernel else LONGEST_FUNCTION):
                found.append(f"{name}:{node.name}")
    return found


def test_files_and_functions_can_be_read():
    files = [path for room in ("kvb", "kernels", "benchmarks", "tests") for path in (ROOT / room).glob("**/*.py")]
    found = {
        one
        for path in files
        if "data" not in path.parts
        for one in too_long(str(path.relative_to(ROOT)), path.read_text())
    }
    assert not found, f"too long: {', '.join(found)}"


def test_what_is_too_long_is_seen():
    for mark, longest in (("", 60), ("@triton.jit\n", 100), ('@kernel("kvb_copy")\n', 100)):
        lines = "    pass\n" * (longest - 1 - mark.count("\n"))
        assert not too_long("a.py", f"{mark}def copy():\n{lines}")
        assert too_long("a.py", f"{mark}def copy():\n{lines}    pass\n") == ["a.py:copy"]
    assert not too_long("a.py", "\n" * 450)
    assert too_long("a.py", "\n" * 451) == ["a.py"]
