"""Jobs of the bucket: where they are stored, which server owns one, how a server works on it."""
