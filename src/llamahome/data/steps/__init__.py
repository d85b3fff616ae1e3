"""Examples to steps: the order of the rows, their division over ranks, and loading ahead. Start reading at order.py."""
