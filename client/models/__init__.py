"""Models by their files: fingerprints, chat template, tokens as text."""
