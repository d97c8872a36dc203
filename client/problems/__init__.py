"""problems: see the files."""
