"""A sweep: one run for every combination of listed values, compared on the same held-out rows."""
