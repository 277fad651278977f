"""Many processes: what training with ``torch.distributed`` needs besides PyTorch's own.

``import kvb`` leaves it out, as some of PyTorch's part is large.
"""

from kvb.distributed import operators
from kvb.distributed.costs import Cost, cost
from kvb.distributed.encoding import encode_dataset
from kvb.distributed.joining import join
from kvb.distributed.parallel import parallelize
from kvb.distributed.values import sync_values

__all__ = ["Cost", "cost", "encode_dataset", "join", "operators", "parallelize", "sync_values"]
