"""Processes and machines: world.py (ranks and exchanges that are no-ops on one process), launch.py (starting them)."""
