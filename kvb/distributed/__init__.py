"""Many processes: what training with ``torch.distributed`` needs besides PyTorch's own.

``import kvb`` leaves it out, as some of PyTorch's part is large.
"""

from kvb.distributed.encoding import encode_dataset
from kvb.distributed.joining import join
from kvb.distributed.values import sync_values

__all__ = ["encode_dataset", "join", "sync_values"]
