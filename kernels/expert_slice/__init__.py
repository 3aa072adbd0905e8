"""Triton kernels of expert slicing: one file per operator, and one table of configurations."""
