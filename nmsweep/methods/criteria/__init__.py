"""Criteria, one file each: the channel weight w."""
