"""Make text safe to show: control characters, Markdown and secrets."""
