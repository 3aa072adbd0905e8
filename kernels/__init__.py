"""Triton kernels and their launchers, one file per operator family; installed as ppmoe_ops.kernels.

Nothing is registered here: `ppmoe_ops._backends` does that. Importing a file needs Triton.
"""
