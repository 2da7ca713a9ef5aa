"""Intervals, tests and paired comparisons: one implementation for cells and reports. Takes arrays; no torch."""
