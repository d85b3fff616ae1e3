"""Words in, words out: the commands. The only place that catches LlamaHomeError; torch is imported inside commands, never here."""
