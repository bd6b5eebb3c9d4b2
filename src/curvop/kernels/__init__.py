"""Torch kernels: objectives, linearization, compilation, CUDA graphs and memory.

The kernels compute products of curvature matrices with tensors. They import torch and the standard library only.
"""
