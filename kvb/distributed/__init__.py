"""Many processes: tables split over devices. ``import kvb`` leaves it out, as ``torch.distributed.tensor`` is large."""

from kvb.distributed.parallel import parallelize

__all__ = ["parallelize"]
