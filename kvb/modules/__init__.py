"""The modules that hold a bottleneck, and how its keys learn."""
