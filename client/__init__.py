"""The client: sends problems to a server, finds the steps where expert and amateur disagree, fills a RUN.

It is the ground floor of the house: it owns the HTTP contract (`protocol`), the bucket contract
(`samples`) and the mathematics of the contrast (`contrast`), and needs neither torch nor vLLM.
"""
