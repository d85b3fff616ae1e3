"""The heart. Reading order: loop, step, evaluate, schedule, optimizer, stop, state. Imports only torch from outside."""
