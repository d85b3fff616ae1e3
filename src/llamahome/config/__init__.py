"""What the user may ask for: schema.py (every setting), load.py (layers and origins), check.py (rules across settings). No torch."""
