"""Adapters on disk and their models: their identity, whether an adapter fits a model, merging."""
