"""One file for each mitigation: the slot of the formula that it fills."""
