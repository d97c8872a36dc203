"""The sampling stage: problems in, a sealed RUN out, resuming and in shards."""
