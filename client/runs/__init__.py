"""A RUN in a bucket: its files, reading, writing and counting them, and RUNs made from other RUNs."""
