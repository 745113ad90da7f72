"""What the tensors and modules of each model type are called, as data files."""
