"""One file for each command: convert, plan, verify, push, replay, diff and others."""
