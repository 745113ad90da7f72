"""Talk to the Hugging Face Hub and to object stores: addresses, reading, limits, publishing."""
