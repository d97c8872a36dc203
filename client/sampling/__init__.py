"""sampling: see the files."""
