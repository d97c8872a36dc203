"""storage: see the files."""
