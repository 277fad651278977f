"""The operator contract: schemas, shapes, gradients, batching, and which backend runs.

Letters, the same in Python, Triton and C++:
    B batch   S positions   C codebooks   K key-value pairs per codebook   D key dim   V value dim   T nearest keys

Each operator is one schema. The reference runs on every device (``CompositeExplicitAutograd``); a faster backend
registers the same schemas under its own dispatch key, and PyTorch's dispatcher picks. Nothing here computes.

Shapes:
    queries [B, S, C, D], any strides with a contiguous last axis    keys [C, K, D]    packed uint8 [C, nbytes]
    mask bool [C, K], True where a pair may be fetched               values [C, K, V]  indices [B, S, C], any integer
    ``nearest`` and ``sample`` return indices int64 and squared distances, both [B, S, C, T].
    A query with NaN or Inf gets the indices 0..T-1 at distance NaN; where fewer than T keys are usable, the lowest
    unused indices follow at distance +inf.
    ``lookup`` takes queries [B, C, D] of one position a sample as well, and leaves S out of its results.
    ``nearest`` and ``lookup`` take int64 of one axis for ``packed`` as well, which stands for packed keys, and
    uint8 [C, 0] for keys that were not packed: ``ops.kept``.
    ``packed_matches`` returns a bool []: whether ``packed`` was made of these keys, as they are now.
    ``sgd_step_`` writes values, takes targets int64 [B], and returns a loss [], a norm [] and logits [B, V].
    ``move_rows_`` writes values [*, V]; it takes places int64 [A, M], an index along each axis but the last, in order
    and without repetition, and grads [M, V], and returns nothing. ``clip_rows_`` writes grads, takes such places, and
    returns a norm [] and a bool []: whether the places are in order; if not, it writes nothing.
    ``rows_to_places`` takes rows int64 [M] of values [C * K, V], and returns the codebook and the pair of each, int64
    [2, M]; ``places_to_rows`` goes back, and says in a bool [] whether the rows ascend without repetition.
    ``product_nearest`` takes queries [N, C, D] and half keys [C, 2, K, D / 2], and returns indices int64 below K * K
    and scores, both [N, C, T]. ``gather_weighted`` and ``gather_dot`` take values [K, V], indices int64 [N, T], and
    weights [N, T] or vectors [N, V]; they return [N, V] and [N, T]. ``scatter_weighted_rows`` takes vectors, indices
    and weights, and returns what ``gather_backward_rows`` returns.
    ``tally_`` writes counts [C, K, V], int32, int64, float32 or float64; it takes targets int64 [B] and weights
    [B, S, C] of the counts' dtype, and returns the lowest counter that it left, [].
    ``update_keys_`` writes keys, keys_avg [C, K, D] and cluster_size [C, K], all of one dtype; it takes hits [C, K] and
    sums [C, K, D] in float32 (float64 for float64 keys), spare rows [C, R, D] like the keys, and int64 usable [C].
"""

from kvb.ops import batching, gradients, kept, memory
from kvb.ops.backends import CPU_CAPABILITIES, absent, backend
from kvb.ops.gradients import clip_rows_, gather, lookup, move_rows_, places_to_rows
from kvb.ops.memory import gather_weighted_row_grad
from kvb.ops.row_gradients import gather_row_grad
from kvb.ops.schemas import IN_PLACE, NAMES, SCHEMAS, operators
from kvb.ops.together import gather_together

__all__ = [
    "CPU_CAPABILITIES",
    "IN_PLACE",
    "NAMES",
    "SCHEMAS",
    "absent",
    "backend",
    "batching",
    "clip_rows_",
    "gather",
    "gather_row_grad",
    "gather_together",
    "gather_weighted_row_grad",
    "gradients",
    "kept",
    "lookup",
    "memory",
    "move_rows_",
    "operators",
    "places_to_rows",
]
