"""``make matrix``: the wheel in a new environment for each version of Python and PyTorch, one after another.

Only CPU builds of PyTorch are installed. A combination that cannot be had here is listed with the reason, and is no
failure; that no combination ran is one.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.13", "3.14")
TORCHES = ("2.10.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
LARGEST = 5e6  # bytes of a wheel
# What a user does first, from the README; then a file, and the plain PyTorch of the same installation.
FIRST_STEPS = """
import re, sys, torch, kvb
assert "site-packages" in kvb.__file__, kvb.__file__
for block in re.findall(r"```python\\n(.*?)```", open(sys.argv[1]).read(), re.DOTALL):
    exec(block)
kvb.save(bottleneck, "bottleneck.pt")
again = kvb.load(kvb.KeyValueBottleneck(64, 256, dim_keys=8, dim_values=10), "bottleneck.pt").eval()
heads = split(features)
assert torch.equal(again(heads), bottleneck.eval()(heads))
nearest = (heads[:, :, None] - bottleneck.keys).double().square().sum(-1).min(-1).values
found = (heads - bottleneck(heads, return_values_only=False).keys).double().square().sum(-1)
assert (found <= nearest * (1 + 1e-12)).all()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dist", type=Path, help="the folder that `make wheels` fills")
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="X.Y", help="versions of Python")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="X.Y.Z", help="versions of PyTorch")
    parser.add_argument("--here", type=Path, metavar="EXE", help="only in this Python, which has a PyTorch")
    chosen = parser.parse_args()
    wheel = _checked(chosen.dist.resolve())
    environment = ROOT / "build" / "matrix"
    if chosen.here:
        print(_tried(chosen.here, wheel, environment))
        return 0
    rows, ran = [], 0
    for torch in chosen.torch:
        for python in chosen.python:
            begun = time.monotonic()
            try:
                result = _tried(_environment(environment, python, torch), wheel, environment)
                ran += 1
            except LookupError as error:
                result = f"not run: {error}"
            rows.append((torch, python, result))
            print(f"torch {torch:8} Python {python:5} {result} ({time.monotonic() - begun:.0f} s)", flush=True)
            shutil.rmtree(environment, ignore_errors=True)
    failed = sum(result.startswith("FAILED") for *_, result in rows)
    print(f"{ran - failed} of {len(rows)} combinations passed, {failed} failed, {len(rows) - ran} not run")
    return 1 if failed or not ran else 0


def _checked(dist: Path) -> Path:
    """The wheel for this machine, where what lies beside it is complete, too."""
    wheels = list(dist.glob("kvb-*-cp310-abi3-*.whl"))
    (pure,), (sdist,) = dist.glob("kvb-*-py3-none-any.whl"), dist.glob("kvb-*.tar.gz")
    if len(wheels) != 1:
        sys.exit(f"expected one wheel with the extension in {dist}, got {len(wheels)}: run make wheels")
    for wheel in (*wheels, pure):
        names = zipfile.ZipFile(wheel).namelist()
        binaries = [name for name in names if ".so" in name]
        if binaries != (["kvb/_C.abi3.so"] if wheel != pure else []):
            sys.exit(f"{wheel.name} holds {', '.join(binaries) or 'no extension'}")
        if wheel.stat().st_size > LARGEST:
            sys.exit(f"{wheel.name} has {wheel.stat().st_size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if (
        missing := {"tests/conftest.py", "docs/guide.md", "csrc/library.cpp", "kvb/kernels/launch.py", "Makefile"}
        - held
    ):
        sys.exit(f"{sdist.name} lacks {', '.join(sorted(missing))}")
    return wheels[0]


def _environment(folder: Path, python: str, torch: str) -> Path:
    """The Python of a new environment that holds this PyTorch; LookupError where one of them is not to be had."""
    shutil.rmtree(folder, ignore_errors=True)
    found = shutil.which(f"python{python}") or next(map(str, _of_pyenv(python)), None)
    if found is None or _run(found, "-c", "import venv, ensurepip").returncode:
        raise LookupError(f"there is no Python {python}")
    if (done := _run(found, "-m", "venv", str(folder))).returncode:
        raise LookupError(_last(done))
    index = os.environ.get("TORCH_INDEX")
    # On Linux a version without "+cpu" may be a build for CUDA, of several gigabytes.
    build = f"torch=={torch}+cpu" if platform.system() == "Linux" else f"torch=={torch}"
    options = ["--only-binary=:all:", *(["--index-url", index] if index else [])]
    executable = folder / "bin" / "python"
    if _run(str(executable), "-m", "pip", "install", "-q", *options, build).returncode:
        raise LookupError(f"no {build} for it in {index or 'the indexes of pip'}: TORCH_INDEX names another")
    return executable


def _of_pyenv(python: str) -> list[Path]:
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    return sorted(path for path in versions.glob(f"{python}.*/bin/python") if "t" not in path.parts[-3])


def _tried(python: Path, wheel: Path, folder: Path) -> str:
    """Install, ask which backend runs, hold every operator to the contract, take the first steps of the README."""
    install = ("-m", "pip", "install", "-q", "--force-reinstall", "--no-deps")
    # A dry run of the dependencies would find another PyTorch than the one to be tested.
    steps = {
        "install tqdm": ("-m", "pip", "install", "-q", "tqdm"),
        "install kvb": (*install, str(wheel)),
        "kvb info": ("-m", "kvb", "info"),
        "kvb check": ("-m", "kvb", "check", "--device", "cpu"),
        "first steps": ("-c", FIRST_STEPS, str(ROOT / "README.md")),
    }
    said = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in steps.items():
        done = _run(str(python), *arguments, cwd=folder)
        said[name] = done.stdout
        if done.returncode:
            return f"FAILED: {name}: {_last(done)}"
    backend = re.search(r"backend on cpu +(.*)", said["kvb info"])
    if backend is None or not backend[1].startswith("cpp"):
        return f"FAILED: backend {backend and backend[1]}"
    return f"{backend[1]}; {said['kvb check'].splitlines()[-1]}; README runs"


def _run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("KVB_", "PYTHON"))}
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stdout + done.stderr).strip().splitlines() or ["no output"])[-1]


if __name__ == "__main__":
    sys.exit(main())
