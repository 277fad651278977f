"""The package as users get it: the contents of a wheel, the switches of a build, the kernels."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*args, cwd=ROOT, **environ):
    """Run a command and return the finished process, with its output as text."""
    env = {k: v for k, v in os.environ.items() if k not in ("KVB_BUILD_EXT", "KVB_SANITIZE", "PYTHONPATH")}
    return subprocess.run(args, cwd=cwd, env=env | environ, capture_output=True, text=True)


def tracked_files():
    """Every file of the checkout that git knows."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    top = run("git", "rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        pytest.skip("not a git checkout")
    names = run("git", "ls-files", "-z").stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a build reads, without C++ sources, and with one module among the kernels."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, tree)
    for name in ("kvb", "kernels", "docs", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    (tree / "kernels" / "probe.py").touch()
    return tree


# As much of a C++ extension as a build can see.
SOURCE = """
#include "common.h"
#include <Python.h>
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
"""


@pytest.fixture
def sources(tree, tmp_path):
    """A copy of `tree` with a small C++ extension."""
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        pytest.skip("there is no C++ compiler")
    copy = tmp_path / "sources"
    shutil.copytree(tree, copy, symlinks=True)
    (copy / "csrc").mkdir()
    (copy / "csrc" / "library.cpp").write_text(SOURCE)
    (copy / "csrc" / "common.h").touch()
    (copy / "csrc" / "search").mkdir()
    (copy / "csrc" / "search" / "impl.inc").touch()
    (copy / "csrc" / "search" / "search.cpp").touch()
    return copy


def build(kind, tree, **environ):
    """What a frontend gets from the build backend, without its isolation: the process and the wheel."""
    out = tree / "out"
    shutil.rmtree(out, ignore_errors=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = run(sys.executable, "-c", code, cwd=tree, **environ)
    return done, next(out.glob("*.whl"), None)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """The wheel built from `tree`."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", f"--wheel-dir={out}"]
    done = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_kernels_is_a_relative_symlink():
    assert os.readlink(ROOT / "kvb" / "kernels") == "../kernels"


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_another_package_named_kernels_is_not_shadowed(tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").touch()
    code = "import kernels; print(kernels.__file__)"
    done = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(other / "__init__.py"), done.stderr


@pytest.mark.parametrize("choice", ["auto", "0"])
def test_build_without_sources_is_pure(tree, choice):
    done = run(sys.executable, "setup.py", "--name", cwd=tree, KVB_BUILD_EXT=choice)
    assert done.returncode == 0, done.stderr


def test_forced_build_without_sources_says_so(tree):
    done = run(sys.executable, "setup.py", "--name", cwd=tree, KVB_BUILD_EXT="1")
    assert done.returncode != 0
    assert "RuntimeError: KVB_BUILD_EXT=1, but there is nothing to build" in done.stderr


@pytest.mark.parametrize("choice", ["yes", "2", ""])
def test_unknown_choice_names_the_allowed_ones(tree, choice):
    done = run(sys.executable, "setup.py", "--name", cwd=tree, KVB_BUILD_EXT=choice)
    assert done.returncode != 0
    expected = f"ValueError: KVB_BUILD_EXT={choice!r}: allowed values are auto, 1, 0"
    assert expected in done.stderr


def said(done):
    """The lines that tell why there is no extension."""
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("kvb: no C++ extension")]


def test_a_build_gives_one_file_for_every_python(sources):
    done, wheel = build("wheel", sources, KVB_BUILD_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"kvb-[\d.]+-cp310-abi3-[a-z]+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if not name.endswith(".py") and name.startswith("kvb/")] == [
        "kvb/_C.abi3.so",
        "kvb/py.typed",
        "kvb/kernels/README.md",
    ]
    assert not said(done)


# Fails to compile under -ffast-math.
EXACT_SOURCE = """
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || defined(__ASSOCIATIVE_MATH__)
#error
#endif
"""


SLOW = [
    pytest.param(flags, marks=pytest.mark.slow)
    for flags in ("-Ofast", "-funsafe-math-optimizations -ffinite-math-only")
]


@pytest.mark.parametrize("flags", ["-ffast-math", *SLOW])
def test_fast_math_among_the_users_flags_is_switched_off(sources, flags):
    (sources / "csrc" / "library.cpp").write_text(EXACT_SOURCE + SOURCE)
    done, wheel = build("wheel", sources, KVB_BUILD_EXT="1", CFLAGS=flags)
    assert done.returncode == 0, done.stdout + done.stderr
    # The linker may add code that flushes subnormals of the whole process as it is loaded.
    subnormal = (
        "import ctypes, sys, torch; x = torch.tensor(1e-40); y = float(x * 1); ctypes.CDLL(sys.argv[1]);"
        "assert float(x * 1) == y > 0"
    )
    (sources / "_C.so").write_bytes(zipfile.ZipFile(wheel).read("kvb/_C.abi3.so"))
    done = run(sys.executable, "-c", subnormal, str(sources / "_C.so"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
def test_the_sources_refuse_fast_math(flag):
    compiler = os.environ.get("CXX", "c++").split()
    if not shutil.which(compiler[0]):
        pytest.skip("there is no C++ compiler")
    done = run(*compiler, "-E", flag, "csrc/common.h")
    assert done.returncode != 0
    assert "kvb cannot be compiled with -ffast-math" in done.stderr


def test_links_and_pictures_of_the_readme_work_on_a_package_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(name).decode()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)
    pictures = re.findall(r"!\[[^]]*\]\((.*?)\)", text)
    assert pictures
    assert all("/raw/main/docs/" in picture and (ROOT / picture.split("/main/")[1]).exists() for picture in pictures)


def test_a_build_that_fails_leaves_a_pure_wheel_and_one_line(sources):
    build("wheel", sources)
    (sources / "csrc" / "library.cpp").write_text("#error")
    done, wheel = build("wheel", sources)
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    (line,) = said(done)
    assert "it does not compile" in line
    assert "pip install --no-build-isolation ." in line
    done, wheel = build("wheel", sources, KVB_BUILD_EXT="1")
    assert done.returncode != 0
    assert wheel is None
    assert "RuntimeError: KVB_BUILD_EXT=1, but it does not compile" in done.stderr


@pytest.mark.parametrize(
    ("absent", "why"),
    [
        ("torch", "torch cannot be imported (not here)"),
        ("compiler", "there is no C++ compiler (no-such-compiler)"),
    ],
)
def test_a_build_without_its_tools_says_which(sources, tmp_path, absent, why):
    environ = {"CXX": "no-such-compiler"} if absent == "compiler" else {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    done, wheel = build("wheel", sources, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = said(done)
    assert why in line
    assert "pip install --no-build-isolation ." in line
    done, wheel = build("wheel", sources, KVB_BUILD_EXT="1", **environ)
    assert done.returncode != 0
    assert wheel is None
    assert f"RuntimeError: KVB_BUILD_EXT=1, but {why}" in done.stderr


def test_an_unwanted_extension_is_not_mentioned(sources):
    done, wheel = build("wheel", sources, KVB_BUILD_EXT="0", CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not said(done)


@pytest.mark.slow
def test_an_editable_build_leaves_no_extension_of_an_earlier_one(sources):
    extension = sources / "kvb" / "_C.abi3.so"
    for choice, text in (("1", SOURCE), ("auto", "#error"), ("1", SOURCE), ("0", SOURCE)):
        (sources / "csrc" / "library.cpp").write_text(text)
        done, _ = build("editable", sources, KVB_BUILD_EXT=choice)
        assert done.returncode == 0, done.stdout + done.stderr
        assert extension.exists() == (choice == "1")
        assert len(said(done)) == (choice == "auto")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is on Linux only")
def test_the_extension_needs_no_newer_glibc_than_pytorch():
    """Whatever it was built beside; which libstdc++ it needs, `make wheels` sees to."""
    extension = ROOT / "kvb" / "_C.abi3.so"
    if not extension.exists():
        pytest.skip("there is no extension")
    found = re.findall(rb"\0GLIBC_2\.(\d+)[\d.]*(?=\0)", extension.read_bytes())
    assert found
    assert max(map(int, found)) <= 28


def test_wheel_is_pure(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"kvb"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kvb").glob("*.py")}
    assert modules | {"kvb/kernels/probe.py"} <= set(names)


def test_sdist_holds_the_kernels_and_the_sources(sources, tmp_path):
    out = tmp_path / "sdist"
    done = run(sys.executable, "setup.py", "-q", "sdist", f"--dist-dir={out}", cwd=sources, KVB_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr
    (sdist,) = out.iterdir()
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"kvb/kernels/README.md", "kvb/kernels/probe.py"} <= names
    assert {"csrc/library.cpp", "csrc/common.h", "csrc/search/search.cpp", "csrc/search/impl.inc"} <= names
    assert {"docs/guide.md", "Makefile", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture
def without_link(tree, tmp_path):
    """A copy of `tree` as git makes it without symbolic links: kvb/kernels is a text file."""
    copy = tmp_path / "without_link"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("build", "out", "*.egg-info"))
    (copy / "kvb" / "kernels").unlink()
    (copy / "kvb" / "kernels").write_text("../kernels")
    return copy


def test_a_wheel_without_symbolic_links_is_the_same(wheel, without_link):
    done, found = build("wheel", without_link)
    assert done.returncode == 0, done.stdout + done.stderr
    names = set(zipfile.ZipFile(found).namelist())
    assert {"kvb/kernels/probe.py", "kvb/kernels/launch.py", "kvb/kernels/README.md"} <= names
    assert names == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("link", [True, False])
def test_a_wheel_of_an_sdist_is_the_same(wheel, tree, without_link, link, tmp_path):
    done = run(
        sys.executable, "setup.py", "-q", "sdist", f"--dist-dir={tmp_path}/sdist", cwd=tree if link else without_link
    )
    assert done.returncode == 0, done.stderr
    (sdist,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(sdist) as tar:
        assert not [entry.name for entry in tar if entry.issym()]
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    done, found = build("wheel", unpacked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(zipfile.ZipFile(found).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_a_checkout_without_symbolic_links_says_what_to_do(without_link):
    # An editable install of kvb would find the kernels of another checkout.
    alone = "import sys; sys.meta_path = [one for one in sys.meta_path if 'editable' not in str(one)]; import kvb"
    environ = {"KVB_CPU_CAPABILITY": "triton", "TRITON_INTERPRET": "1"}
    done = run(sys.executable, "-c", alone, cwd=without_link, **environ)
    if "Triton is not installed" in done.stderr:
        pytest.skip("Triton is not installed")
    assert "kvb/kernels is no folder, because this checkout was made without symbolic links: run `git" in done.stderr
    assert run(sys.executable, "-c", f"{alone}; print(kvb.info())", cwd=without_link).returncode == 0
    (without_link / "kvb" / "kernels").unlink()
    shutil.copytree(without_link / "kernels", without_link / "kvb" / "kernels")
    assert run(sys.executable, "-c", alone, cwd=without_link, **environ).returncode == 0


def test_metadata(wheel):
    """What a package index shows, and the command that an installation brings."""
    contents = zipfile.ZipFile(wheel)
    info = next(name.partition("/")[0] for name in contents.namelist() if ".dist-info/" in name)
    facts = email.message_from_bytes(contents.read(f"{info}/METADATA"))
    assert facts["Author"] == "kvb contributors"
    assert "Typing :: Typed" in facts.get_all("Classifier")
    assert {link.partition(",")[0] for link in facts.get_all("Project-URL")} >= {"Source", "Issues", "Changelog"}
    assert "kvb = kvb.__main__:main" in contents.read(f"{info}/entry_points.txt").decode()


def test_version_stands_in_one_file(wheel):
    version = wheel.name.split("-")[1]
    literal = re.compile(rf"""["']{re.escape(version)}["']""")
    files = [path for path in tracked_files() if path.suffix in (".py", ".toml", ".cfg")]
    hits = [path.relative_to(ROOT).as_posix() for path in files if literal.search(path.read_text())]
    assert hits == ["kvb/about.py"]


def test_no_file_names_a_path_of_one_machine():
    machine_path = re.compile(rb"(?<![\w.~/$}-])/(?:home|root|tmp|Users)/\w")
    files = [path for path in tracked_files() if machine_path.search(path.read_bytes())]
    assert not files
