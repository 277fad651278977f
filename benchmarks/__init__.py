"""Benchmarks of kvb against its peers and the machine's ceilings; run from the repository root.

    python -m kvb bench          a table for everybody (bench); --full: every suite and peer; --peers: who is missing
    make bench                   the same contestants under pytest-benchmark (test_suites)
    python -m benchmarks.bars    the promised ratios, held on this machine
    python -m benchmarks.scaling --json FILE     cost against N, K, C and D, the crossover, the overhead of a call
    python -m benchmarks.race --out DIR          random shapes against the best of plain PyTorch and faiss, every loss
    python -m benchmarks.report [FILE ...]       files results, and rewrites tables and plots
    python -m benchmarks.cpu, .training, .graphs, .memory_layers, .gpu    single rows next to the machine's ceilings

Suites say what is measured, shapes at which sizes, peers against whom, verify what is right, timing how long it took,
memory how much it held, ceilings what the machine can do, results how all of it is kept.
"""
