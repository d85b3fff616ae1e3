"""doctor: whether this machine, this installation and these settings can train, and what mends what cannot."""
