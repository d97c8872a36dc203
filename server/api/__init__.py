"""The HTTP service: its routes, its checks, streamed responses, and the drain of the process."""
