"""Many cells: their plan, the executors that run them, their status."""
