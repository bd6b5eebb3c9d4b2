r"""
Taking a Hessian apart
======================

The Hessian of even a small network is a large matrix, and often only a part of it is of interest: one layer, the
coupling of two layers, a handful of weights. This tutorial shows how to get hold of such parts, checks each of them
against the dense matrix, and measures what they cost.

A network, a loss and two batches of data are all we need.
"""

import time

import numpy as np
import torch
from torch import nn

from curvop import HessianLinearOperator
from curvop.examples.functorch import functorch_hessian
from curvop.submatrix import SubmatrixLinearOperator
from curvop.utils import allclose_report

torch.manual_seed(2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

inputs, hidden, outputs, examples = 7, 5, 3, 20

model = nn.Sequential(
    nn.Linear(inputs, hidden),
    nn.ReLU(),
    nn.Linear(hidden, hidden),
    nn.Sigmoid(),
    nn.Linear(hidden, outputs),
).to(DEVICE)
loss_function = nn.MSELoss(reduction="mean")
data = [(torch.rand(examples, inputs), torch.rand(examples, outputs)) for _ in range(2)]

# %%
# The whole matrix
# ----------------
#
# The order of ``params`` is the order of rows and columns. Constructing the operator costs nothing; the first product
# runs the model.

params = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
H = HessianLinearOperator(model, loss_function, params, data)
P = H.shape[1]
print(H, H.params_slices)

# %%
# The network is small enough to write its Hessian down. ``functorch_hessian`` does so another way (forward mode over
# reverse mode, on all data as one batch), which makes it a fair judge. Multiplying by the identity gives the same
# matrix column by column; a tensor goes in, so a tensor comes out.

H_dense = functorch_hessian(model, loss_function, params, data)
assert allclose_report(H_dense, H @ torch.eye(P, device=DEVICE))

# %%
# One parameter
# -------------
#
# The block on the diagonal that belongs to the first layer's weight is the Hessian with respect to that weight alone:
# restrict ``params`` to it.

name0, name1 = list(params)[:2]
H_param0 = HessianLinearOperator(model, loss_function, {name0: params[name0]}, data)
first = H.params_slices[name0]
assert allclose_report(H_dense[first, first], H_param0 @ torch.eye(H_param0.shape[1], device=DEVICE))

# %%
# The operator of the whole matrix knows its blocks by name, so there is no need for a second constructor.

assert allclose_report(H_dense[first, first], H.block(name0) @ torch.eye(first.stop, device=DEVICE))

# %%
# Off the diagonal
# ----------------
#
# How do the first layer's weight and bias interact? Their block is rectangular: rows of the weight, columns of the
# bias.

second = H.params_slices[name1]
rows, cols = list(range(first.start, first.stop)), list(range(second.start, second.stop))
H_param0_param1 = SubmatrixLinearOperator(H, rows, cols)
print(H_param0_param1)
assert allclose_report(H_dense[first, second], H_param0_param1 @ torch.eye(len(cols), device=DEVICE))
assert allclose_report(H_dense[first, second], H.block(name0, name1) @ torch.eye(len(cols), device=DEVICE))

# %%
# Rows and columns of your choice
# -------------------------------
#
# Nothing ties a submatrix to layers. Three rows, three columns, from anywhere:

rows, cols = [0, 13, 42], [1, 2, 3]
H_sub = SubmatrixLinearOperator(H, rows, cols)
print(H_sub @ np.eye(len(cols)))
assert allclose_report(H_dense[rows, :][:, cols], H_sub @ torch.eye(len(cols), device=DEVICE))

# %%
# NumPy's notation gives the same operator.

assert allclose_report(H_dense[rows, :][:, cols], H[rows, :][:, cols] @ torch.eye(len(cols), device=DEVICE))

# %%
# What a part costs
# -----------------
#
# A submatrix could be computed by multiplying with the whole Hessian and throwing most of the result away. Here only
# the parameters that the rows and columns touch take part, so a block sliced from the whole costs what the operator
# costs that was restricted from the start. The two are timed in turns, and the medians compared.


def medians(*functions, repeats=300):
    """Time functions in turns; return the median seconds of each."""
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function().cpu()  # waits for a GPU to finish
            times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in seconds]


x = torch.rand(H_param0.shape[1], device=DEVICE)
H_sliced = H[first, first]
assert allclose_report(H_param0 @ x, H_sliced @ x)
restricted, sliced, whole = medians(
    lambda: H_param0 @ x, lambda: H_sliced @ x, lambda: (H @ torch.nn.functional.pad(x, (0, P - len(x))))[first]
)
print(f"operator restricted to {name0}: {1e3 * restricted:.2f} ms a product")
print(f"the same block sliced from H: {1e3 * sliced:.2f} ms a product ({sliced / restricted:.2f} times)")
print(f"the whole H, and its rows cut out: {1e3 * whole:.2f} ms a product ({whole / restricted:.2f} times)")
