"""Processes and machines: world.py (ranks and collectives, which do nothing on one process), launch.py (starts the processes)."""
