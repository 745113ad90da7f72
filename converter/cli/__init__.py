"""The command line: parse arguments, print results, end with an exit code. No logic."""
