"""Packed scoring: requests that share a context are scored in one row, without computing a token twice."""
