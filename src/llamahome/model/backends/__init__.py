"""Everything that differs by device. Reading order: backend, reference, cuda, cpu."""
