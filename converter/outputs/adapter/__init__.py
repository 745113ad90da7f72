"""The edit as a LoRA adapter."""
