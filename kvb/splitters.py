"""Splitters turn features [B, *shape, channels] into one head per codebook, [B, C, *shape, D].

Source: Träuble et al., ICML 2023 (arXiv:2207.11240), section 3.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from kvb import validation
from kvb.modules.tracing import OneNode

Mode = Literal["chunk", "random_projection", "sparse_projection", "learned_projection"]
MODES: tuple[Mode, ...] = get_args(Mode)


def make(mode: Mode | nn.Module, num_channels: int, num_codebooks: int, dim_keys: int) -> nn.Module:
    """The splitter for a published ``splitting_mode``; a module is returned as it is.

    Raises:
        ValueError: an unknown mode; "chunk" with ``dim_keys`` other than channels / C. TypeError: neither a mode nor a
        module.
    Examples:
        >>> kvb.splitters.make("random_projection", 64, num_codebooks=4, dim_keys=8)(torch.randn(5, 64)).shape
        torch.Size([5, 4, 8])
    """
    if isinstance(mode, nn.Module):
        return mode
    if not isinstance(mode, str):
        raise TypeError(f"splitting_mode must be a string or a torch.nn.Module, got {type(mode).__name__}")
    validation.choice("splitting_mode", mode, MODES)
    if mode == "chunk":
        chunk = Chunk(num_channels, num_codebooks)
        if chunk.dim_keys != dim_keys:
            raise ValueError(
                f"dim_keys must be num_channels / num_codebooks = {num_channels} / {num_codebooks} = {chunk.dim_keys} "
                f"with splitting_mode='chunk', got {dim_keys}; the projections take any dim_keys"
            )
        return chunk
    kinds = {"random": RandomProjection, "sparse": SparseProjection, "learned": LearnedProjection}
    return kinds[mode.removesuffix("_projection")](num_channels, num_codebooks, dim_keys)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix [channels, n], in float32 at least: half precision, of autocast too, would move codes."""
    wide = torch.promote_types(torch.promote_types(x.dtype, matrix.dtype), torch.float32)
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x.to(wide) @ matrix.to(wide)
    with torch.autocast(kind, enabled=False):
        return x.to(wide) @ matrix.to(wide)


def _check_features(owner: str, x: Tensor, channels: int) -> None:
    validation.floating(owner, "x", x)
    if x.dim() < 2 or x.shape[-1] != channels:
        raise ValueError(f"expected x of shape (B, *shape, channels) = (B, *shape, {channels}), got {tuple(x.shape)}")


def _added_heads(wanted: int, now: int) -> int:
    if validation.positive_int("num_codebooks", wanted) < now:
        raise ValueError(f"expand(): splitters only grow, expected num_codebooks >= {now}, got {wanted}")
    return wanted - now


class Chunk(OneNode):
    """Cut the channels into C consecutive heads of D.

    Equivalent to ``x.unflatten(-1, (C, D)).movedim(-2, 1)``; a view, no copy.

    Args:
        num_channels: size of the last axis of the features; a multiple of ``num_codebooks``.
        num_codebooks: C.
    Raises:
        ValueError: the channels do not divide evenly.
    Examples:
        >>> kvb.splitters.Chunk(6, num_codebooks=3)(torch.arange(6.0)[None])
        tensor([[[0., 1.],
                 [2., 3.],
                 [4., 5.]]])
    """

    num_channels: int
    num_codebooks: int
    dim_keys: int

    def __init__(self, num_channels: int, num_codebooks: int) -> None:
        super().__init__()
        self.num_channels = validation.positive_int("num_channels", num_channels)
        self.num_codebooks = validation.positive_int("num_codebooks", num_codebooks)
        self.dim_keys, rest = divmod(num_channels, num_codebooks)
        if rest:
            raise ValueError(f"num_channels ({num_channels}) must be divisible by num_codebooks ({num_codebooks})")

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *shape, channels] -> [B, C, *shape, D]."""
        if isinstance(x, Proxy):
            return self._call_of(x)
        _check_features("Chunk", x, self.num_channels)
        return x.unflatten(-1, (self.num_codebooks, self.dim_keys)).movedim(-2, 1)

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels -> {self.num_codebooks} heads of {self.dim_keys}"


class RandomProjection(OneNode):
    """Project the features once per codebook with a fixed random matrix of unit columns.

    Equivalent to ``torch.einsum("b...d,cdk->bc...k", x, rand_proj)``. The matrix is a buffer and never learns.

    Args:
        num_channels: size of the last axis of the features.
        num_codebooks: C.
        dim_keys: D.
        generator: draws the matrix, on its own device; PyTorch's default otherwise.
        device, dtype: of the matrix; by default float32.
    State:
        rand_proj: [C, channels, D], the published name.
    Examples:
        >>> split = kvb.splitters.RandomProjection(64, num_codebooks=4, dim_keys=8)
        >>> split(torch.randn(5, 7, 7, 64)).shape
        torch.Size([5, 4, 7, 7, 8])
    """

    num_channels: int
    num_codebooks: int
    dim_keys: int
    rand_proj: Tensor

    def __init__(
        self,
        num_channels: int,
        num_codebooks: int,
        dim_keys: int,
        *,
        generator: torch.Generator | None = None,
        device: validation.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = validation.positive_int("num_channels", num_channels)
        self.num_codebooks = validation.positive_int("num_codebooks", num_codebooks)
        self.dim_keys = validation.positive_int("dim_keys", dim_keys)
        # Autograd refuses tensors created in inference mode.
        with torch.inference_mode(False), validation.placed(generator.device if generator else device):
            matrix = self._unit(num_codebooks, generator)
            self.register_buffer("rand_proj", matrix.to(device=device, dtype=validation.float_dtype(dtype)))

    def _unit(self, heads: int, generator: torch.Generator | None) -> Tensor:
        """A matrix for so many heads, with unit columns."""
        return nn.functional.normalize(self._draw(heads, generator), dim=1)

    def _draw(self, heads: int, generator: torch.Generator | None) -> Tensor:
        """A matrix [heads, channels, D]; its columns are scaled to unit norm afterwards."""
        shape = heads, self.num_channels, self.dim_keys
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *shape, channels] -> [B, C, *shape, D] in float32 or float64: one product, heads moved as a view."""
        if isinstance(x, Proxy):
            return self._call_of(x)
        _check_features(type(self).__name__, x, self.num_channels)
        validation.same_device("x", x, "the projections", self.rand_proj)
        heads = _product(x, self.rand_proj.transpose(0, 1).flatten(1))
        return heads.unflatten(-1, (self.num_codebooks, self.dim_keys)).movedim(-2, 1)

    def expand(self, num_codebooks: int, *, generator: torch.Generator | None = None) -> None:
        """Make heads for so many codebooks: the old ones as before, the others with matrices of their own.

        Raises:
            TypeError, ValueError: no positive integer, or less than now.
        """
        added = _added_heads(num_codebooks, self.num_codebooks)
        with torch.inference_mode(False), torch.no_grad():
            self.rand_proj = torch.cat([self.rand_proj, self._unit(added, generator).to(self.rand_proj)])
        self.num_codebooks = num_codebooks

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels -> {self.num_codebooks} heads of {self.dim_keys}"


class SparseProjection(RandomProjection):
    """A fixed random projection in which every output looks at about the square root of all channels.

    As ``RandomProjection``, but each column holds exactly round(sqrt(channels)) entries of equal size and random sign,
    at random places. It preserves distances between features as well as dense columns do, except for heavy tails.

    Source: Li, Hastie and Church, Very sparse random projections, KDD 2006. In the published code
    "sparse_projection" is a name without code.

    Examples:
        >>> split = kvb.splitters.SparseProjection(64, num_codebooks=4, dim_keys=8)
        >>> (split.rand_proj != 0).sum(1).unique()  # channels that an output looks at
        tensor([8])
    """

    def _draw(self, heads: int, generator: torch.Generator | None) -> Tensor:
        shape = (heads, self.num_channels, self.dim_keys)
        entries = max(1, round(self.num_channels**0.5))
        places = torch.rand(shape, generator=generator, dtype=torch.float32).topk(entries, dim=1).indices
        signs = torch.randint(2, places.shape, generator=generator).mul_(2).sub_(1).to(torch.float32)
        return torch.zeros(shape, dtype=torch.float32).scatter_(1, places, signs)


class LearnedProjection(OneNode):
    """Project the features with one linear map without bias, a parameter.

    Equivalent to ``proj(x).unflatten(-1, (D, C)).movedim(-1, 1)``: key dim major, as published.
    Fetched values give it no gradient: it learns from the ``distances`` of a bottleneck, or from another use of its
    output.

    Args:
        num_channels: size of the last axis of the features.
        num_codebooks: C.
        dim_keys: D.
        device, dtype: of the weight.
    State:
        proj.weight: [D*C, channels], the published name and order.
    Examples:
        >>> split = kvb.splitters.LearnedProjection(64, num_codebooks=4, dim_keys=8)
        >>> split(torch.randn(5, 64)).shape
        torch.Size([5, 4, 8])
    """

    num_channels: int
    num_codebooks: int
    dim_keys: int
    proj: nn.Linear

    def __init__(
        self,
        num_channels: int,
        num_codebooks: int,
        dim_keys: int,
        *,
        device: validation.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": validation.float_dtype(dtype)}
        self.num_channels = validation.positive_int("num_channels", num_channels)
        self.num_codebooks = validation.positive_int("num_codebooks", num_codebooks)
        self.dim_keys = validation.positive_int("dim_keys", dim_keys)
        with torch.inference_mode(False):  # parameters created in inference mode cannot learn
            self.proj = nn.Linear(num_channels, num_codebooks * dim_keys, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *shape, channels] -> [B, C, *shape, D] in float32 or float64: one product, heads moved as a view."""
        if isinstance(x, Proxy):
            return self._call_of(x)
        _check_features("LearnedProjection", x, self.num_channels)
        validation.same_device("x", x, "the projections", self.proj.weight)
        heads = _product(x, self.proj.weight.mT)
        return heads.unflatten(-1, (self.dim_keys, self.num_codebooks)).movedim(-1, 1)

    def expand(self, num_codebooks: int, *, generator: torch.Generator | None = None) -> None:
        """Make heads for so many codebooks: the old ones as before, the others drawn as a new module draws them.

        ``proj.weight`` becomes another parameter.

        Raises:
            TypeError, ValueError: no positive integer, or less than now.
        """
        added = _added_heads(num_codebooks, self.num_codebooks)
        old, bound = self.proj.weight, self.num_channels**-0.5
        with torch.inference_mode(False), torch.no_grad():
            new = old.new_empty(self.dim_keys, added, self.num_channels).uniform_(-bound, bound, generator=generator)
            both = torch.cat([old.detach().unflatten(0, (self.dim_keys, self.num_codebooks)), new], 1).flatten(0, 1)
        self.proj.weight = nn.Parameter(both, requires_grad=old.requires_grad)
        self.proj.out_features, self.num_codebooks = len(both), num_codebooks

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels -> {self.num_codebooks} heads of {self.dim_keys}"
