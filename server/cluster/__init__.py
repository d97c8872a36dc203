"""The server on Ray Serve: a front that answers HTTP, and replicas of the pair, whose number changes."""
