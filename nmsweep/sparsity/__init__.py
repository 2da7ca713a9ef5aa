"""Which channels are dropped, what stands in their place, and how a model is made to do so."""
