"""Mitigations, one file each: the slot of the formula that they fill."""
