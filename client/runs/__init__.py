"""runs: see the files."""
