"""Run a model, in memory or a layer at a time, as it is or edited through hooks."""
