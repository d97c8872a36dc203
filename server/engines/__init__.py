"""The pair over two vLLM engines: how it starts, what it answers, and how its processes end."""
