"""Settings: schema.py (every setting), load.py (layers and origins), check.py (rules across settings). No torch."""
