"""report: see the files."""
