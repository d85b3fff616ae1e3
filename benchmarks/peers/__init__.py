"""One file per trainer: each loads the starter, then does steps when it is its turn. They run in environments without llamahome."""
