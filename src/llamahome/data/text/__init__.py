"""Conversations to examples with the chat template and tokenizer of the model. Start reading at targets.py."""
