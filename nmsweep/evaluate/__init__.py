"""Measure a model: perplexity of a text, and tasks of the lm-evaluation-harness."""
