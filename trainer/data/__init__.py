"""data: see the files."""
