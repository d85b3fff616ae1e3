"""Conversations to examples: the model's template and tokens, and which of them are learned, proved. Begin with targets."""
