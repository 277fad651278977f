"""The GPU backend: one function for each operator of ``kvb/ops``, with the operator's own signature."""

from kvb.kernels.device import target
from kvb.kernels.launch_keys import update_keys_
from kvb.kernels.launch_pack import pack_keys
from kvb.kernels.launch_search import lookup, nearest
from kvb.kernels.launch_statistics import accumulate, count
from kvb.kernels.launch_training import sgd_step_
from kvb.kernels.launch_values import gather, gather_backward, gather_backward_rows
from kvb.kernels.layout import packed_nbytes

__all__ = [
    "accumulate",
    "count",
    "gather",
    "gather_backward",
    "gather_backward_rows",
    "lookup",
    "nearest",
    "pack_keys",
    "packed_nbytes",
    "sgd_step_",
    "target",
    "update_keys_",
]
