"""What can be known of a model from its files: fingerprints, chat template, tokens as text."""
