"""Small models with random weights, and the plain computation that answers are held to."""
