"""What to do with a GPU that is there for a few minutes only: ``python -m benchmarks.gpu_day first --out DIR``.

    first     ``check`` beside ``smoke``, then ``bench``: 8 minutes at most
    second    ``tune``, then ``counters``: 4 minutes at most

    check     every operator against the contract, as ``python -m kvb check`` does: check.jsonl
    smoke     what only a card can show: millions of queries, graphs, streams, compiled modules: smoke.jsonl
    bench     ``python -m benchmarks.gpu``: gpu.jsonl and gpu.txt
    tune      other block sizes beside those of the launch table, each verified: tune.jsonl
    counters  what the hardware counted in the kernels that take the time: counters.jsonl

Each of the five can be named alone. Every result is on disk when it is known; ``--budget`` ends everything in time.
``--device cpu --small`` tries the program itself. Needs no package but torch, triton and numpy.
"""
