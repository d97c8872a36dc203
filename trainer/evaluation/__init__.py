"""evaluation: see the files."""
