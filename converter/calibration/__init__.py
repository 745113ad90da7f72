"""Texts in, statistics out: pairs, prose, word lists, and a model's activations on them."""
