"""Checkpoints of the published packages as kvb's, and back, bit for bit; state_dicts in, state_dicts out.

key_value_bottleneck has kvb's names, without its flags and mask. discrete_key_value_bottleneck_pytorch and
discrete_key_value_bottleneck have those of ``_TO_KVB``. Version 0.0.x of the former has them too, with one projection
[dim, C*D] for all codebooks, or none: its columns, cut into C heads, are kvb's [C, dim, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvb import splitters, validation
from kvb.checkpoints import STATE_NAMES
from kvb.modules import bottleneck, discrete

PACKAGES = (
    "key_value_bottleneck",
    "discrete_key_value_bottleneck_pytorch",
    "discrete_key_value_bottleneck_pytorch-0.0",
    "discrete_key_value_bottleneck",
)
_PROJECTIONS = ("project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias")
_TO_KVB = {
    "values": "bottleneck.values",
    "rand_proj": "splitter.rand_proj",
    "vq._codebook.initted": "bottleneck.initted",
    "vq._codebook.cluster_size": "bottleneck.cluster_size",
    "vq._codebook.embed_avg": "bottleneck.keys_avg",
    "vq._codebook.embed": "bottleneck.keys",
    **{f"vq.{name}": f"splitter.{name}" for name in _PROJECTIONS},
}
_TO_PUBLISHED = {ours: theirs for theirs, ours in _TO_KVB.items()}
_ALWAYS = {ours for ours in _TO_PUBLISHED if ours.startswith("bottleneck.")}


class AccidentalProjections(nn.Module):
    """The splitter of a published checkpoint with learned projections: random projections, then one linear map of all.

    Equivalent to ``project_in(einsum("b...d,cde->b...ce", x, rand_proj).flatten(-2))``, cut into C heads.

    Args:
        num_channels: of the embeddings.
        num_codebooks: C.
        dim: of what the random projections give each head; None for a checkpoint without them, of version 0.0.x.
        dim_keys: D of each head; C·dim in every checkpoint made by accident.
    State:
        rand_proj [C, num_channels, dim]; project_in.*; project_out.*, which belongs to the quantised output of the
        published class and is carried along unused.
    """

    num_channels: int
    num_codebooks: int
    dim_keys: int
    project_in: nn.Linear
    project_out: nn.Linear
    rand_proj: Tensor | None

    def __init__(self, num_channels: int, num_codebooks: int, dim: int | None, dim_keys: int) -> None:
        super().__init__()
        C, self.num_channels = num_codebooks, num_channels
        self.num_codebooks, self.dim_keys = C, dim_keys
        joined = num_channels if dim is None else C * dim
        self.register_buffer("rand_proj", None if dim is None else torch.empty(C, num_channels, dim))
        self.project_in = nn.Linear(joined, C * dim_keys)
        self.project_out = nn.Linear(C * dim_keys, joined)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *shape, num_channels] -> [B, C, *shape, D]."""
        if self.rand_proj is not None:
            x = torch.einsum("b...d,cde->b...ce", x, self.rand_proj.to(x.dtype)).flatten(-2)
        return self.project_in(x).unflatten(-1, (self.num_codebooks, self.dim_keys)).movedim(-2, 1)

    def extra_repr(self) -> str:
        return f"{self.num_channels} channels -> {self.num_codebooks} heads of {self.dim_keys}, mixed"


def from_published(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state_dict of any of the published packages with kvb's names.

    Args:
        state: as ``torch.load(path, weights_only=True)`` or ``kvb.checkpoints.read_state(path)`` gives it; also the
            ``{"bottleneck": ..., "splitter": ...}`` of the authors' ``BottleneckedEncoder.save``.
    Returns:
        a state_dict for ``kvb.KeyValueBottleneck``, ``kvb.BottleneckedEncoder`` or ``kvb.DiscreteKeyValueBottleneck``.
    Raises:
        ValueError: the names are of none of them, or some are missing; one codebook of keys for several of values.
    Examples:
        >>> published = kvb.compat.key_value_bottleneck.core.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> state = kvb.compat.from_published(published.state_dict())
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> bottleneck.load_state_dict(state)
        <All keys matched successfully>
    """
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    if "vq._codebook.embed" in flat:
        return _from_discrete(flat)
    if "keys_avg" in flat or "bottleneck.keys_avg" in flat:
        return flat
    raise ValueError(
        "expected a state_dict with keys_avg, bottleneck.keys_avg or vq._codebook.embed, got the names "
        f"{', '.join(sorted(flat)[:8]) or 'of an empty one'}"
    )


def _from_discrete(state: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {_ours(name): value for name, value in state.items()}
    if missing := [theirs for ours, theirs in _TO_PUBLISHED.items() if ours in _ALWAYS - converted.keys()]:
        raise ValueError(f"expected the state_dict of a whole DiscreteKeyValueBottleneck, {', '.join(missing)} missing")
    C = converted["bottleneck.values"].shape[0]
    if converted["bottleneck.keys"].shape[0] != C:
        raise ValueError(
            f"expected a codebook of keys for each of the {C} of values, got {converted['bottleneck.keys'].shape[0]}: "
            "versions up to 0.0.4 share one among all, which kvb cannot hold"
        )
    projection = converted.get("splitter.rand_proj")
    if projection is not None and projection.dim() == 2:  # of version 0.0.x
        converted["splitter.rand_proj"] = projection.unflatten(1, (C, -1)).transpose(0, 1).contiguous()
    initted = converted["bottleneck.initted"]
    converted["bottleneck.initted"] = initted.to(torch.float32).reshape(1)
    converted["bottleneck.cluster_size_counter"] = torch.zeros_like(converted["bottleneck.cluster_size"])
    return converted


def _ours(name: str) -> str:
    if name in _TO_KVB or name.startswith("encoder."):
        return _TO_KVB.get(name, name)
    raise ValueError(f"{name!r} is no tensor of a checkpoint that kvb can convert: expected {', '.join(_TO_KVB)}")


def to_published(state: Mapping[str, Tensor], package: str, *, old_initted: bool = False) -> dict[str, Tensor]:
    """The inverse of ``from_published``.

    Which keys are frozen, counts of a ``DiscreteKeyValueBottleneck``, and masks are not part of a published state.

    Args:
        state: a state_dict of a kvb module.
        package: one of ``PACKAGES``; "-0.0" is for version 0.0.x.
        old_initted: write ``initted`` as [1] float, for vector-quantize-pytorch up to 1.21; or else as [] bool.
    Raises:
        ValueError: another package, or a state_dict that such a module cannot have.
    Examples:
        >>> bottleneck = kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> sorted(kvb.compat.to_published(bottleneck.state_dict(), "key_value_bottleneck"))
        ['cluster_size', 'cluster_size_counter', 'initted', 'keys', 'keys_avg', 'values']
    """
    validation.choice("package", package, PACKAGES)
    kept = {name: value for name, value in state.items() if name.rpartition(".")[2] not in STATE_NAMES}
    if package == "key_value_bottleneck":  # whose counts are floats
        return {name: value.float() if name.endswith("cluster_size_counter") else value for name, value in kept.items()}
    kept.pop("bottleneck.cluster_size_counter", None)
    if strange := [name for name in kept if name not in _TO_PUBLISHED and not name.startswith("encoder.")]:
        raise ValueError(f"expected the state_dict of a kvb.DiscreteKeyValueBottleneck, got {', '.join(strange)}")
    converted = {_TO_PUBLISHED.get(name, name): value for name, value in kept.items()}
    if package.endswith("-0.0") and "rand_proj" in converted:
        converted["rand_proj"] = converted["rand_proj"].transpose(0, 1).flatten(1)
    initted = converted["vq._codebook.initted"].reshape(1)
    converted["vq._codebook.initted"] = initted if old_initted else initted[0] != 0
    return converted


def module_from(
    state: Mapping[str, Any], **options: Any
) -> bottleneck.KeyValueBottleneck | discrete.DiscreteKeyValueBottleneck:
    """A kvb module with the sizes and the state of a published checkpoint.

    A checkpoint with learned projections gives a module whose splitter is ``AccidentalProjections``, one of version
    0.0.x without random projections gives one with ``kvb.splitters.Chunk``; every other one gives kvb's own. Version
    0.0.x joins its memories: ``module(x).movedim(1, -2).flatten(-2)``. For a ``BottleneckedEncoder``, build it yourself
    and load ``from_published(state)``.

    Args:
        state: as for ``from_published``, of a bottleneck.
        options: more arguments of the module: ``decay``, ``encoder``, ``average_pool_memories``, ...
    Raises:
        ValueError: the names are of no bottleneck. RuntimeError: shapes that do not belong together.
    Examples:
        >>> published = kvb.compat.key_value_bottleneck.core.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10)
        >>> kvb.compat.module_from(published.state_dict()).values.shape
        torch.Size([4, 16, 10])
    """
    converted = from_published(state)
    if "keys_avg" in converted:
        C, K, V = converted["values"].shape
        module: Any = bottleneck.KeyValueBottleneck(C, K, converted["keys"].shape[-1], V, **options)
    elif "vq._codebook.embed" in state:
        module = _discrete_module(state, converted, options)
    else:
        raise ValueError("expected the state_dict of a bottleneck; build a BottleneckedEncoder yourself, and load it")
    module.load_state_dict(converted)
    return module


def _discrete_module(
    state: Mapping[str, Any], converted: dict[str, Tensor], options: dict[str, Any]
) -> discrete.DiscreteKeyValueBottleneck:
    (C, K, V), D = converted["bottleneck.values"].shape, converted["bottleneck.keys"].shape[-1]
    projections, mixed = converted.get("splitter.rand_proj"), converted.get("splitter.project_in.weight")
    if projections is not None:
        channels, dim = projections.shape[1:]
    else:
        channels, dim = (C * D if mixed is None else mixed.shape[1]), None
    if projections is None or state["rand_proj"].dim() == 2:  # of version 0.0.x
        options = {"average_pool_memories": False, **options}
    sizes = {"num_memories": K, "num_memory_codebooks": C, "dim_memory": V, "dim_embed": channels, "codebook_dim": D}
    module = discrete.DiscreteKeyValueBottleneck(D, **{**sizes, **options})
    if mixed is not None:
        module.splitter = AccidentalProjections(channels, C, dim, D)
    elif projections is None:
        module.splitter = splitters.Chunk(channels, C)
    return module
