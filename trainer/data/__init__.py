"""Turns a RUN into training examples: labels at positions, optimizer steps, packed sequences."""
