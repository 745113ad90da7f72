"""Texts in, statistics out: pairs, prose and word lists, and what a model makes of them."""
