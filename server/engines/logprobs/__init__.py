"""The expert's log-probabilities come from its engine as arrays: no object a token, one message a request."""
