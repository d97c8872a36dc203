"""Small models with random weights, and the reference computation that answers are compared with."""
