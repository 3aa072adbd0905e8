"""Equilibrium solves (LION, arXiv 2303.09992): cells solved row by row, and solvers for any f."""
