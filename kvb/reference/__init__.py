"""The definition of every kvb operator in plain PyTorch, and the fallback on every device.

Letters (defined in ``kvb/ops``): B batch, S positions, C codebooks, K pairs per codebook, D key dim, V value dim,
T nearest keys asked for. Nothing of size B*S*C*K is ever allocated: all work goes through tiles of ``TILE`` elements.
"""

from kvb.reference.histograms import tally_
from kvb.reference.memory import gather_dot, gather_weighted, product_nearest, scatter_weighted_rows
from kvb.reference.packing import pack_keys, packed_matches, packed_nbytes
from kvb.reference.places import clip_rows_, move_rows_, places_to_rows, rows_to_places
from kvb.reference.search import lookup, nearest, sample
from kvb.reference.statistics import accumulate, count, update_keys_
from kvb.reference.values import gather, gather_backward, gather_backward_rows, sgd_step_

__all__ = [
    "accumulate",
    "clip_rows_",
    "count",
    "gather",
    "gather_backward",
    "gather_backward_rows",
    "gather_dot",
    "gather_weighted",
    "lookup",
    "move_rows_",
    "nearest",
    "pack_keys",
    "packed_matches",
    "packed_nbytes",
    "places_to_rows",
    "product_nearest",
    "rows_to_places",
    "sample",
    "scatter_weighted_rows",
    "sgd_step_",
    "tally_",
    "update_keys_",
]
