"""Pruning of weights instead of activations: the baselines that share the grid."""
