"""Real data for the experiments, and the installed packages that carry it."""
