"""engines: see the files."""
