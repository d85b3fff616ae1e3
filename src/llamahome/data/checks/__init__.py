"""What is wrong with data, statistics, and a cleaned copy. Start reading at check.py."""
