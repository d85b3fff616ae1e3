"""The back end for processors: C++ passes compiled on the user's machine, and how they are called."""
