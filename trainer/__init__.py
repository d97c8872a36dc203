"""The trainer: reads a RUN from the bucket, fine-tunes the expert on its contrast samples, and measures the gain.

In: a RUN and the expert that sampled it. Out: a LoRA adapter in PEFT format, a merged model, or scores. It imports
`client` to read RUNs, and never sends requests to a server.
"""
