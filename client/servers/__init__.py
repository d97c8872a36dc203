"""servers: see the files."""
