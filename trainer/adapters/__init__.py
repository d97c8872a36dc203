"""Adapters on disk and the models they belong to: what identifies them, whether they fit, one merged into the other."""
