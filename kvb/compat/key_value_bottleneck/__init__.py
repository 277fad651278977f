"""The authors' package ``key_value_bottleneck`` 1.0.0, as it was published last."""

from kvb.compat.key_value_bottleneck import core, splitters, utils

__all__ = ["core", "splitters", "utils"]
