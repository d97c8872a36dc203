"""What the files of a model tell: fingerprints, chat template, tokens as text."""
