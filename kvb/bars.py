"""Progress bars: of everything that reads whole data sets, in terminals and notebooks, once it takes a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm.auto import tqdm

PATIENCE = 1.0  # seconds until a bar is shown
_Item = TypeVar("_Item")


def new(title: str, total: int | None, *, shown: bool = True) -> tqdm[Any]:
    """A bar that vanishes at the end: a context, whose ``update(n)`` tells of n more of ``total``."""
    return tqdm(desc=title, total=total, disable=not shown, leave=False, delay=PATIENCE)


def of(items: Iterable[_Item], title: str, total: int | None = None, *, shown: bool = True) -> Iterator[_Item]:
    """The items, read once; ``total`` is their number, by default their length if they have one."""
    # tqdm itself would begin to read twice: it makes an iterator of what it is given, and another one when it begins.
    total = len(items) if total is None and isinstance(items, Sized) else total
    with new(title, total, shown=shown) as counter:
        for item in items:
            yield item
            counter.update()
