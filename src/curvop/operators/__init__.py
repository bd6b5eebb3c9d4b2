"""Curvature matrices as SciPy linear operators.

This package defines subclasses of ``LinearOperator``, whose products ``curvop.kernels`` computes. ``base`` defines
operators that accept arrays and tensors. ``parameter_operator`` defines operators whose rows or columns are parameters.
``engine_operator`` defines operators whose products are sums over batches. ``hessian``, ``ggn``, ``fisher`` and
``jacobian`` define the public matrices. ``kronecker`` defines Kronecker-factored matrices.
``submatrix_operator``, ``algebra`` and ``diagonal_operator`` define operators that are composed of others.
"""
