"""The training loop and its parts. Reading order: loop, step, run, metrics, evaluate, schedule. Imports only torch from outside."""
