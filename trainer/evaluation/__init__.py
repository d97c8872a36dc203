"""Accuracy: asks a model and its adapters, grades the outputs, and makes tables."""
