"""The OpenAI-compatible server that `llamahome serve` starts."""
