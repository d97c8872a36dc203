"""The trainer: reads a RUN from the bucket, fine-tunes the expert on its contrast samples, measures what it gained.

In: a RUN and the expert that sampled it. Out: a LoRA adapter in PEFT format, a merged model, or scores.
It stands on `client` (the bucket contract) and never talks to a server.
"""
