"""Servers that tests talk to: ours with real engines, an S3 store, one that answers from memory, a proxy."""
