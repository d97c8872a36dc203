"""The pair over two vLLM engines: its start, its prompts and results, and the end of its processes."""
