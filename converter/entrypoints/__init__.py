"""One file for each thing a user asks for: convert, plan, verify, push, replay, diff."""
