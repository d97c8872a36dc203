"""The server: two vLLM engines, an expert and a weaker amateur, behind one HTTP service.

It answers each problem with the expert's trajectory and, for every step of it, both models'
log-probabilities of the expert's top-k ids. It keeps no state: what it says is in its answer.
"""
