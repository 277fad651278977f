"""Makes tests/data/golden_seeds.pt anew: what the published packages give for its inputs, from the same seed.

    python tests/data/make_golden_seeds.py --authors CHECKOUT --packages FOLDER [--out FILE]

CHECKOUT is a clone of https://github.com/ftraeuble/discrete_key_value_bottleneck. FOLDER holds the other packages, each
version in a folder of its own, as ``pip install --no-deps --target FOLDER/NAME==VERSION NAME==VERSION`` makes them
(what these need, einops and einx, must be importable). Inputs, sizes and options are those of the file; every result is made anew, by the
version in ``VERSIONS``, in a process that sees no other. Without --out the results are compared with the file: the exit
status is 1 where one differs. Cases whose packages are neither given nor installed are left out, and named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

GOLDEN = Path(__file__).with_name("golden_seeds.pt")
SEED = 7
_DISCRETE, _QUANTIZE = "discrete-key-value-bottleneck-pytorch", "vector-quantize-pytorch"
# By the first part of a case's name: the folders to import from.
VERSIONS = {
    "author": None,
    "v01": (f"{_DISCRETE}==0.1.1", f"{_QUANTIZE}==1.32.0"),
    "quantize": (f"{_QUANTIZE}==1.32.0",),
    "v00": (f"{_DISCRETE}==0.0.8", f"{_QUANTIZE}==1.32.0"),
    "old01": (f"{_DISCRETE}==0.1.1", f"{_QUANTIZE}==1.6.28"),
    "old00": (f"{_DISCRETE}==0.0.8", f"{_QUANTIZE}==0.10.14"),
}


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items() if not name.startswith("encoder.")}


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.tensor(list(file.getvalue()), dtype=torch.uint8)


def author(case):
    from key_value_bottleneck import core

    network = [] if case["encoder"] is None else [getattr(nn, case["encoder"][0])(*case["encoder"][1])]
    module = getattr(core, case["kind"])(*network, *case["sizes"], **case["options"])
    for x in case["x"][:-1]:
        module(x)
    if case["frozen"]:
        module.update_keys = False
        getattr(module, "bottleneck", module).update_keys = False
    output = module(case["x"][-1])
    return module, {"out": [part.detach() for part in output]}


def discrete(case):
    from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck

    module = DiscreteKeyValueBottleneck(6, **case["options"])
    for x in case["x"]:
        memories, (_, indices, loss) = module(x, return_intermediates=True)
    return module, {"memories": memories.detach(), "indices": indices, "loss": loss.detach()}


def quantize(case):
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(6, 12)
    quantized, indices, loss = module(case["x"], mask=case["mask"])
    codes = module.get_codes_from_indices(indices.clamp(min=0))
    return module, {"out": [quantized.detach(), indices, loss.detach()], "codes": codes.detach()}


def made(name, case):
    """The same case with results of the package that is importable here."""
    torch.manual_seed(SEED)
    module, results = {"author": author, "quantize": quantize}.get(name.split("_")[0], discrete)(case)
    results["state"] = state_of(module)
    if "drawn" in case:
        results["drawn"] = torch.rand(2)
    if "pickle" in case:
        module.eval()
        results["pickle"] = pickled(module)
        again = module(case["x"][-1])
        results["again"] = [part.detach() for part in again] if isinstance(again, tuple) else again.detach()
    return {**case, **results}


def installed(requirement):
    name, version = requirement.split("==")
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def paths(group, authors, packages):
    """What to import from for the cases of a group, nothing where it is installed; None where it is not there."""
    wanted = VERSIONS[group]
    if wanted is not None and all(map(installed, wanted)):
        return []
    folders = [authors] if wanted is None else [packages and packages / name for name in wanted]
    return [str(folder) for folder in folders] if all(folder and folder.is_dir() for folder in folders) else None


def make(authors, packages):
    """All cases that can be made, and the names of the others."""
    golden = torch.load(GOLDEN, weights_only=True)
    found, missing = {}, []
    for group in VERSIONS:
        names = [name for name in golden if name.split("_")[0] == group]
        importable = paths(group, authors, packages)
        if importable is None:
            missing += names
            continue
        with tempfile.NamedTemporaryFile() as out:
            others = filter(None, [os.environ.get("PYTHONPATH")])
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*importable, *others])}
            subprocess.run([sys.executable, __file__, "--only", group, "--out", out.name], check=True, env=environ)
            found |= torch.load(out.name, weights_only=True)
    return {name: found[name] for name in golden if name in found}, missing


def differences(found, want, name):
    """Where two results differ by more than the last digits. Pickles are compared by what they name."""
    if isinstance(want, dict):
        if list(found) != list(want):
            return [f"{name}: {list(found)} instead of {list(want)}"]
        return [one for key in want for one in differences(found[key], want[key], f"{name}.{key}")]
    if isinstance(want, (list, tuple)):
        return [one for i, part in enumerate(want) for one in differences(found[i], part, f"{name}[{i}]")]
    if name.endswith(".pickle"):
        return [] if globals_of(found) == globals_of(want) else [f"{name}: other names in the pickle"]
    if isinstance(want, torch.Tensor):
        same = found.shape == want.shape and found.dtype == want.dtype
        same = same and torch.allclose(found.double(), want.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
        return [] if same else [f"{name}: other numbers"]
    return [] if found == want else [f"{name}: {found!r} instead of {want!r}"]


def globals_of(data):
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(bytes(data.tolist()))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=VERSIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    golden = torch.load(GOLDEN, weights_only=True)
    if options.only:
        warnings.simplefilter("ignore")
        cases = {name: case for name, case in golden.items() if name.split("_")[0] == options.only}
        torch.save({name: made(name, case) for name, case in cases.items()}, options.out)
        return 0
    found, missing = make(options.authors, options.packages)
    if missing:
        print("not made, as their package is not given:", ", ".join(missing))
    if options.out:
        torch.save({**golden, **found}, options.out)
        return 0
    wrong = [one for name, case in found.items() for one in differences(case, golden[name], name)]
    print("\n".join(wrong) if wrong else f"{len(found)} cases are as in {GOLDEN.name}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
