"""The edit as a whole checkpoint."""
