"""The back end for CUDA devices, made of torch's own parts."""
