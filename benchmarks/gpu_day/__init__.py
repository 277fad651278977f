"""What to do with a GPU that can be had for a few minutes: ``python -m benchmarks.gpu_day first --out DIR``.

    first     ``check`` next to ``smoke``, then ``bench``: 8 minutes at most
    second    ``tune``, then ``counters``: 4 minutes at most

    check     every operator against the contract, as ``python -m kvb check`` does: check.jsonl
    smoke     what only a card can show: millions of queries, graphs, streams, compiled modules: smoke.jsonl
    bench     ``python -m benchmarks.gpu``: gpu.jsonl and gpu.txt
    tune      other block sizes than those of the launch table, each verified: tune.jsonl
    counters  what the hardware counted in the kernels that take the time: counters.jsonl

Each of the five can be named alone. Every result is on disk when it is known; ``--budget`` ends everything in time.
``--device cpu --small`` tries the program itself. Needs no package but torch, triton and numpy.
"""
