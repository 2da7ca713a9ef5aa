"""Criteria, mitigations and weight-pruning baselines, one small file each, and the classes that they derive from."""
