"""Shapes drawn at random, kvb against the quickest other way to compute the same: ``python -m benchmarks.race``.

``draws`` says which shapes, ``searches``, ``tables`` and ``steps`` who takes part, ``racing`` times them, ``summary``
makes figures and a picture of what was found.
"""
