"""What kvb is measured against, by name: packages, imported where they are there, and plain PyTorch.

Nothing of them is copied here. What is not there raises ``Absent`` when it is asked for, with the way to get it.
"""

from __future__ import annotations

from benchmarks.peers import need
from benchmarks.timing import Absent

# Every peer, what it takes part in, the module to import, and what pip calls it ("" where torch is all it needs).
PEERS = {
    "torch.cdist": ("searches and what holds one: torch.cdist + argmin", "torch", ""),
    "torch baddbmm": ("searches and what holds one: baddbmm + argmin in chunks", "torch", ""),
    "torch.compile": ("searches: the same, compiled", "torch", ""),
    "torch index": ("gather, backward: values[c, indices] and its autograd", "torch", ""),
    "torch index_select": ("gather: one index_select", "torch", ""),
    "torch index_add": ("backward: one index_add_", "torch", ""),
    "faiss": ("search, forward: IndexFlatL2", "faiss", "faiss-cpu"),
    "scikit-learn": ("search: pairwise_distances_argmin", "sklearn", "scikit-learn"),
    "pykeops": ("search: LazyTensor, compiled for each D", "pykeops", "pykeops pybind11"),
    "vector-quantize": ("search, key_update", "vector_quantize_pytorch", "vector-quantize-pytorch"),
    "dkvb-pytorch": (
        "memories, training_step: discrete-key-value-bottleneck-pytorch",
        "discrete_key_value_bottleneck_pytorch",
        "discrete-key-value-bottleneck-pytorch vector-quantize-pytorch",
    ),
    "authors": ("forward: the authors' package", "key_value_bottleneck.core", ""),
    "flash-kmeans": ("search on a GPU: python -m benchmarks.gpu", "flash_kmeans", "flash-kmeans"),
}


def listed() -> dict[str, tuple[str, str]]:
    """What every peer is for, and why it is absent ("" where it is there)."""
    found = {}
    for name, (role, module, install) in PEERS.items():
        why = ""
        try:
            need.package(module, install)
        except Absent as absent:
            why = str(absent)
        found[name] = (role, why)
    return found
