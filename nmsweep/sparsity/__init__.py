"""The formula, the sparse layers that compute it, and how they are put into a model."""
