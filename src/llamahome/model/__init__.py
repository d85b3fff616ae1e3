"""From a folder or a hub id to a module ready to train. Reading order: load, starter, lora, attention, loss, place, adapter, generate."""
