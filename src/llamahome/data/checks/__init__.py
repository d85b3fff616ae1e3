"""What is wrong with data, what it comes to, and a cleaned copy. Begin with check."""
