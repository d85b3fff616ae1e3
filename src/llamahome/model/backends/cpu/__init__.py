"""The back end for processors: C++ kernels compiled on the user's machine, and the code that calls them."""
