"""The machine: files, JSON, cache, memory, progress."""
