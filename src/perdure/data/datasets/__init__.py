"""Data sets as tensors on one device; one data set a file."""
