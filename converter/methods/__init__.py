"""Fit an edit to a model: one file for each method."""
