"""RUNs made without a model, sampled, or read as other programs read them."""
