"""Who runs without a fast backend is told once, at the first call, and told what to do."""

import os
import subprocess
import sys

import pytest

CALLS = """if True:
    import sys, warnings
    sys.modules["kvb._C"] = None  # as where it was never built
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        import torch, kvb
        module = kvb.KeyValueBottleneck(2, 4, 3, 5)
        print(*(str(one.message) for one in found), sep="\\n")
        for _ in range(2):
            module(torch.randn(6, 2, 3))
        kvb.functional.nearest(torch.randn(6, 1, 2, 3), torch.randn(2, 4, 3))
    print(*(str(one.message) for one in found), sep="\\n")
"""


@pytest.mark.parametrize(("chosen", "said"), [({}, True), ({"KVB_CPU_CAPABILITY": "torch"}, False)])
def test_a_slow_path_says_so_once(chosen, said):
    environ = {name: value for name, value in os.environ.items() if name != "KVB_CPU_CAPABILITY"}
    done = subprocess.run([sys.executable, "-c", CALLS], env=environ | chosen, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = (
        "kvb runs in plain PyTorch on cpu, many times slower than it can: the C++ extension was not built: "
        "pip install --no-build-isolation . in an environment with g++ and torch"
    )
    assert done.stdout == f"\n{line if said else ''}\n"
