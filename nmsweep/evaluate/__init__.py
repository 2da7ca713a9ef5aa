"""What a cell is measured by: perplexity of a text, and tasks of the lm-evaluation-harness."""
