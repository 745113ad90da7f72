"""Formats of weights that are read as if they were safetensors files."""
