"""Accuracy: what a model and its adapters answer, how often that is right, and the tables of it."""
