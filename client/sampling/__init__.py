"""The sampling stage: problems in, a complete RUN out; it resumes, and several clients can share the problems."""
