"""HTTP to one or many servers: connections, each server's share of the work, problems spread over the servers."""
