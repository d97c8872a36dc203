"""The HTTP contract: what requests may say, and the lines that answer them."""
