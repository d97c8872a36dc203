"""training: see the files."""
