"""What a RUN looks like: one HTML page with its charts, and RUNs side by side."""
