"""The process behind ``python -m kvb check``: steps in, one line of JSON for each out, what was wrong or "".

    python -m kvb.testing BACKEND DEVICE THREADS OPERATOR:CASE,OPERATOR:CASE,...

Cases are numbers of ``CASES``. An empty line says that the process is ready. It ends with ``LOST`` after a failure that
leaves the device unusable; the remaining steps then need a new process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import torch

from kvb.testing.cases import CASES
from kvb.testing.runner import LOST
from kvb.testing.verdicts import attempt, backends, device_is_lost


def main(arguments: Sequence[str]) -> int:
    name, device, threads, steps = arguments
    torch.set_num_threads(min(int(threads), torch.get_num_threads()))
    backend = backends(torch.device(device))[name]
    # Whatever a compiler or a driver prints must not come between the lines.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(file=channel, flush=True)
    for step in steps.split(","):
        operator, _, number = step.partition(":")
        failure = attempt(operator, backend, CASES[int(number)])
        print(json.dumps(failure), file=channel, flush=True)
        if failure and device_is_lost(backend.device):
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
