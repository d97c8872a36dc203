"""The server: two vLLM engines, an expert and a weaker amateur, behind one HTTP service.

It answers each problem with the expert's trajectory and, for each of its steps, both models' log-probabilities of the
expert's top-k ids. It keeps no state of its own: jobs are in the bucket.
"""
