"""jobs: see the files."""
