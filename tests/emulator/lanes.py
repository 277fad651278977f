"""Sets of lanes. A lane is one thread of one program of a batch; all lanes step through the code side by side."""

from __future__ import annotations

import functools

import numpy as np

WARP = 32


class Lanes:
    """The lanes that an instruction runs in, in the forms that NumPy and C take."""

    def __init__(self, mask: np.ndarray, living: np.ndarray) -> None:
        self.mask, self.living = mask, living

    @functools.cached_property
    def number(self) -> int:
        return int(np.count_nonzero(self.mask))

    @functools.cached_property
    def all(self) -> bool:
        return self.number == len(self.mask)

    @functools.cached_property
    def where(self) -> np.ndarray | bool:
        """For ``where=``: True where every other lane has left the program, so that its registers may change."""
        return True if self.all or bool((self.mask | ~self.living).all()) else self.mask

    @functools.cached_property
    def pointer(self) -> int | None:
        """The same for C."""
        return None if self.where is True else self.mask.ctypes.data

    @functools.cached_property
    def index(self) -> np.ndarray:
        return np.flatnonzero(self.mask)

    @functools.cached_property
    def select(self) -> np.ndarray | slice:
        """What picks these lanes out of an array of all lanes."""
        return slice(None) if self.all else self.index

    @functools.cached_property
    def warps(self) -> np.ndarray:
        """How many lanes of each warp."""
        return self.mask.reshape(-1, WARP).sum(1)

    @functools.cached_property
    def whole_warps(self) -> bool:
        return self.all or bool((self.warps % WARP == 0).all())

    def split(self, condition: np.ndarray, negated: bool) -> tuple[Lanes | None, Lanes | None]:
        """Those where the condition holds and those where it does not; nothing where there are none."""
        mask = self.mask & ~condition if negated else self.mask & condition
        number = int(np.count_nonzero(mask))
        if number == 0:
            return None, self
        if number == self.number:
            return self, None
        return Lanes(mask, self.living), Lanes(self.mask & ~mask, self.living)

    def where_true(self, condition: np.ndarray, negated: bool) -> Lanes | None:
        """The first half of ``split``."""
        mask = self.mask & ~condition if negated else self.mask & condition
        number = int(np.count_nonzero(mask))
        if number == 0:
            return None
        return self if number == self.number else Lanes(mask, self.living)

    def __or__(self, other: Lanes) -> Lanes:
        return Lanes(self.mask | other.mask, self.living)
