"""The HTTP service: its routes, what guards them, how answers are streamed, how the process drains."""
