"""Curvature matrices as SciPy linear operators."""
