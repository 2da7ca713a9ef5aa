"""Intervals, tests and comparisons of paired items, used by cells and reports alike. Takes arrays; no torch."""
