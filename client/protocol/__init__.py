"""protocol: see the files."""
