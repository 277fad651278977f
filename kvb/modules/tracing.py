"""``torch.fx.symbolic_trace``: every module of kvb is one node, like those of ``torch.nn``, for inputs of any shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from torch.fx import Proxy
from torch.fx.node import has_side_effect

_Self = TypeVar("_Self", bound="OneNode")


class OneNode(nn.Module):
    """A module that a symbolic trace calls and does not enter: its forward asks for shapes, which a trace lacks."""

    @property
    def itself(self: _Self) -> _Self:
        """What a graph calls where this module is all that was traced: it names a part of what was traced."""
        return self

    def _call_of(self, x: Proxy, *args: Any, more: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The node that calls this module.

        Args:
            more: keyword arguments that the forward takes by ``**``; a trace that begins here cannot pass them on.
        """
        tracer: Any = x.tracer
        if isinstance(more, Proxy):
            tracer.create_proxy("call_function", none_left, (more,), {})
            more = {}
        target = tracer.path_of_module(self) or "itself"
        return tracer.create_proxy("call_module", target, (x, *args), {**options, **(more or {})})


@has_side_effect  # nothing takes it for dead code
def none_left(options: Mapping[str, Any]) -> None:
    """In a graph: it has no place for these.

    Raises:
        TypeError: there are some.
    """
    if options:
        raise TypeError(f"a traced module takes no more arguments for its encoder, got {', '.join(map(repr, options))}")
