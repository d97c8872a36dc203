"""cli: see the files."""
