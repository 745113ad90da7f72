"""Read a checkpoint: where it is, its format, its headers, its architecture."""
