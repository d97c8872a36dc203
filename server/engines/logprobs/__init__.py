"""Moves the expert's log-probabilities out of its engine as arrays: no object per token, one message per request."""
