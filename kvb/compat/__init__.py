"""The published contracts: their modules by their own names, and their checkpoints."""

from kvb.compat import discrete_key_value_bottleneck, discrete_key_value_bottleneck_pytorch, key_value_bottleneck
from kvb.compat.aliases import alias, unalias
from kvb.compat.convert import from_published, module_from, to_published

__all__ = [
    "alias",
    "discrete_key_value_bottleneck",
    "discrete_key_value_bottleneck_pytorch",
    "from_published",
    "key_value_bottleneck",
    "module_from",
    "to_published",
    "unalias",
]
