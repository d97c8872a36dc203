"""The HTTP contract: requests, and the lines of responses."""
