"""A local Ray cluster, and a pair that answers from memory in its replicas."""
