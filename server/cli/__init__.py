"""The commands of the server: `serve` over HTTP, and `sample` without it."""
