"""Run a model, in memory or a layer at a time, unedited or edited through hooks."""
