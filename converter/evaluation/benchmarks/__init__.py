"""Benchmarks that others defined, run on a model as it is and as it is edited."""
