"""``key_value_bottleneck.splitters``: the published names of kvb's own splitters, which keep the published state."""

from kvb.splitters import Chunk as Chunker
from kvb.splitters import LearnedProjection as LearnedDownProjection
from kvb.splitters import RandomProjection as RandomDownProjection

__all__ = ["Chunker", "LearnedDownProjection", "RandomDownProjection"]
