"""From files to training steps. Reading order: records, sources, formats, tokens, prepare, order, batching, loader.

file --sources--> Row --formats--> Conversation --tokens--> Example --order--> the step's examples --batching--> [Microbatch]
"""
