"""Curvature matrices as SciPy linear operators.

This package defines subclasses of ``LinearOperator``, whose products ``curvop.kernels`` computes. ``base`` defines
operators that accept arrays and tensors, and submatrices. ``parameter_operator`` defines operators whose rows or
columns are parameters, and damped operators. ``engine_operator`` defines operators whose products are sums over
batches. ``hessian``, ``ggn``, ``fisher`` and ``jacobian`` define the public classes.
"""
