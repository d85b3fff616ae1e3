"""What a run would need and take, before it starts."""
