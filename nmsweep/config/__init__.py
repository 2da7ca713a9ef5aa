"""Typed configuration: schema, composition with Hydra, catalogue of options, patterns, recipes. No torch."""
