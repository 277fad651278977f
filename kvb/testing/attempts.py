"""Goes on after an error of others' code, and keeps it: of backends, packages, drivers and profilers."""

from __future__ import annotations

from typing import Any, TypeVar

_Attempt = TypeVar("_Attempt", bound="Attempt")


class Attempt:
    """Keeps what went wrong inside: nobody can list how the code of others fails, but nothing else may stop for it."""

    error: Exception | None = None

    def __enter__(self: _Attempt) -> _Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None

    @property
    def error_line(self) -> str:
        """The error in one line; empty without one."""
        return " ".join(f"{type(self.error).__name__}: {self.error}".split()) if self.error else ""
