"""Criteria that prune weights instead of activations: the baselines."""
