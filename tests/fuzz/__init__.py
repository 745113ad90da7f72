"""Coverage-guided fuzzing of what reads untrusted bytes; see ``tests/README.md``."""
