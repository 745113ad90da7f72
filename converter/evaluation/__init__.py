"""Measure an edited model on held-out text and prompts, and judge it: guard and gates."""
