"""Benchmarks of kvb against its peers and the machine's ceilings; run from the repository root."""
