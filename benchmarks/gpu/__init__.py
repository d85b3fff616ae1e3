"""`make bench-gpu`: correctness, speed and memory on one GPU, with nothing downloaded."""
