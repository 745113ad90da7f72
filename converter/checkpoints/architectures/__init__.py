"""Find the names of a model's tensors and modules, and prove them."""
