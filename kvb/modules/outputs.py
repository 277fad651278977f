"""What calls of the modules return: the tuples, and for type checkers which arguments get one instead of a tensor."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, TypeVar, overload

from torch import Tensor

from kvb._torch import register_namedtuple
from kvb.functional import Pool

_Details = TypeVar("_Details", covariant=True)


class BottleneckOutput(NamedTuple):
    """What ``KeyValueBottleneck`` returns with ``return_values_only=False``; a topk axis follows C if topk > 1.

    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> found = bottleneck(torch.randn(5, 4, 8), return_values_only=False)
        >>> found.values.shape, found.indices.shape
        (torch.Size([5, 4, 10]), torch.Size([5, 4]))
    """

    values: Tensor  # [B, C, *shape, V]
    keys: Tensor  # [B, C, *shape, D]
    indices: Tensor  # [B, C, *shape] int64
    distances: Tensor  # [B, C, *shape] squared L2


class Intermediates(NamedTuple):
    """What ``DiscreteKeyValueBottleneck`` adds with ``return_intermediates=True``."""

    quantized: Tensor  # [B, *shape, C*D]: the keys found, without a gradient; zero where masked
    memory_indices: Tensor  # [B, C, *shape] int64, for bottleneck.decode
    commit_loss: Tensor  # []: mean squared distance to the keys in training mode, 0 in eval mode


# torch.export.save needs a name for the output type.
register_namedtuple(BottleneckOutput, serialized_type_name="kvb.BottleneckOutput")
register_namedtuple(Intermediates, serialized_type_name="kvb.Intermediates")


class Lookup(Protocol):
    """A call of ``KeyValueBottleneck``. Left out, ``return_values_only`` is the module's, which no type tells."""

    @overload
    def __call__(self, x: Tensor, *, mask: Tensor | None = None, pool: Pool | None = None) -> Tensor | Any: ...
    @overload
    def __call__(
        self, x: Tensor, *, mask: Tensor | None = None, pool: Pool | None = None, return_values_only: Literal[True]
    ) -> Tensor: ...
    @overload
    def __call__(
        self, x: Tensor, *, mask: Tensor | None = None, pool: Pool | None = None, return_values_only: Literal[False]
    ) -> BottleneckOutput: ...
    @overload
    def __call__(
        self, x: Tensor, *, mask: Tensor | None = None, pool: Pool | None = None, return_values_only: bool | None = None
    ) -> Tensor | Any: ...


class Encoding(Protocol):
    """A call of ``BottleneckedEncoder``: the same of anything that the encoder takes."""

    @overload
    def __call__(
        self,
        x: Any = None,
        *,
        mask: Tensor | None = None,
        pool: Pool | None = None,
        return_values_only: Literal[True],
        **encoder_options: Any,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        x: Any = None,
        *,
        mask: Tensor | None = None,
        pool: Pool | None = None,
        return_values_only: Literal[False],
        **encoder_options: Any,
    ) -> BottleneckOutput: ...
    @overload
    def __call__(
        self,
        x: Any = None,
        *,
        mask: Tensor | None = None,
        pool: Pool | None = None,
        return_values_only: bool | None = None,
        **encoder_options: Any,
    ) -> Tensor | Any: ...


class Recall(Protocol[_Details]):
    """A call of a ``DiscreteKeyValueBottleneck``: memories, and with ``return_intermediates`` the details."""

    @overload
    def __call__(self, x: Any, return_intermediates: Literal[False] = False, *rest: Any, **options: Any) -> Tensor: ...
    @overload
    def __call__(
        self, x: Any, return_intermediates: Literal[True], *rest: Any, **options: Any
    ) -> tuple[Tensor, _Details]: ...
    @overload
    def __call__(
        self, x: Any, return_intermediates: bool, *rest: Any, **options: Any
    ) -> Tensor | tuple[Tensor, _Details]: ...
