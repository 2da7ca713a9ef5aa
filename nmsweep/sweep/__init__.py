"""Many cells: their plan, who runs them where, how far they are, what is left of them. Stands on `run`."""
