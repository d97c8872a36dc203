"""adapters: see the files."""
