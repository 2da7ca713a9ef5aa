"""One file for each criterion: the channel weight w that it gives."""
