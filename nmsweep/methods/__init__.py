"""Methods: criteria, mitigations and weight-pruning baselines, one file each, and their base classes."""
