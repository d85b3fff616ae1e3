"""Stop and go on. Reading order: manifest (what a checkpoint holds), store (whole or not there), retention (which ones stay)."""
