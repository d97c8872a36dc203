"""A RUN as training examples: labels at positions, optimizer steps, packed sequences."""
