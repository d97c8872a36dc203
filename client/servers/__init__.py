"""HTTP to one or many servers: connections, how much each may be given, problems shared among them."""
