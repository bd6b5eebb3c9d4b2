"""Checks of operators and of computed eigenvalues."""
