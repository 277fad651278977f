"""Two texts of different kind that come with Python: its language reference, in English, and source code.

Both are © Python Software Foundation, under the PSF License Version 2; they are read where Python keeps them, and
belong to the Python that runs.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

BYTES = 400_000  # of each text
TEST_SHARE = 0.1  # from its end
SOURCES = (
    *("argparse", "ast", "configparser", "datetime", "decimal", "doctest", "inspect", "pathlib", "pickle", "tarfile"),
    *("_pydecimal", "_pydatetime", "_pyio", "pydoc", "subprocess", "threading", "turtle", "typing", "zipfile"),
)


@dataclass(frozen=True)
class Text:
    """Bytes as int64: what is learned, and what is left to measure."""

    name: str
    train: Tensor
    test: Tensor


def _text(name: str, content: str, size: int) -> Text:
    data = torch.tensor(list(content.encode()[:size]))
    cut = int(len(data) * (1 - TEST_SHARE))
    return Text(name, data[:cut], data[cut:])


def reference(size: int = BYTES) -> Text:
    """The language reference as ``help()`` shows it."""
    return _text("language reference", "\n".join(topics.topics[name] for name in sorted(topics.topics)), size)


def sources(size: int = BYTES) -> Text:
    """Modules of the standard library; those that this Python lacks as a file are left out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / f"{name}.py" for name in SOURCES]
    return _text("source code", "\n".join(file.read_text("utf-8") for file in files if file.is_file()), size)


@dataclass(frozen=True)
class Texts:
    """What the study of memory layers is about: a text that comes first, and one that follows."""

    name: str
    title: str
    first: Callable[[int], Text]
    second: Callable[[int], Text]


STUDY = Texts("texts", "Python's language reference, then source code", reference, sources)
