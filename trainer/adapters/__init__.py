"""Adapters on disk and their models: what identifies them, whether they fit together, merging."""
