"""models: see the files."""
