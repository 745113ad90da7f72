"""Other programs read what is written: `make consumers`, and `python -m tests.consumers`."""
