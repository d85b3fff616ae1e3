"""Checkpoints. Read manifest.py (what a checkpoint contains), then store.py (how it is committed), then retention.py (which are kept)."""
