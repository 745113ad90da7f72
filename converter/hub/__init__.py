"""Talk to the Hugging Face Hub: repos, limits, publishing."""
