"""The commands. Only this package catches LlamaHomeError; torch is imported inside commands, never at the top of a module."""
