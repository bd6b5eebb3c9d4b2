"""Curvature matrices as SciPy linear operators.

The modules of this package present the products that ``curvop.kernels`` computes as ``LinearOperator`` subclasses.
``base`` converts arrays and tensors and defines submatrices. ``parameter_operator`` defines operators over parameters,
and damping. ``engine_operator`` defines operators whose products are computed by an engine. ``hessian``, ``ggn``,
``fisher`` and ``jacobian`` define the public matrices.
"""
