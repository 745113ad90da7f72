"""Talk to the Hugging Face Hub: repos, limits, uploads, permissions."""
