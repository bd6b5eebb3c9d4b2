r"""
Taking a Hessian apart
======================

The Hessian of even a small network is large, and often only a submatrix is of interest: the block of one layer, the
coupling of two layers, or the rows of a few weights. This tutorial shows how to obtain submatrices, checks each of them
against the dense matrix, and measures the cost of a product.

We need a network, a loss and two batches of data.
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
# The order of ``params`` is the order of rows and columns. The constructor does not run the model; the first product
# does.

params = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
H = HessianLinearOperator(model, loss_function, params, data)
P = H.shape[1]
print(H, H.params_slices)

# %%
# The network is small enough for a dense Hessian. ``functorch_hessian`` computes the dense Hessian with an independent
# method (forward mode over reverse mode, with all data as one batch). The product of the operator and the identity
# matrix is the same dense Hessian. The identity matrix is a tensor, so the product is a tensor too.

H_dense = functorch_hessian(model, loss_function, params, data)
assert allclose_report(H_dense, H @ torch.eye(P, device=DEVICE))

# %%
# One parameter
# -------------
#
# The diagonal block of the first layer's weight is the Hessian with respect to this weight alone. Restrict ``params``
# to this weight:

name0, name1 = list(params)[:2]
H_param0 = HessianLinearOperator(model, loss_function, {name0: params[name0]}, data)
first = H.params_slices[name0]
assert allclose_report(H_dense[first, first], H_param0 @ torch.eye(H_param0.shape[1], device=DEVICE))

# %%
# The operator of the whole matrix returns the same block if you pass the name of the parameter to ``block``:

assert allclose_report(H_dense[first, first], H.block(name0) @ torch.eye(first.stop, device=DEVICE))

# %%
# Off the diagonal
# ----------------
#
# The block that couples the weight and the bias of the first layer is rectangular: its rows belong to the weight and
# its columns to the bias.

second = H.params_slices[name1]
rows, cols = list(range(first.start, first.stop)), list(range(second.start, second.stop))
H_param0_param1 = SubmatrixLinearOperator(H, rows, cols)
print(H_param0_param1)
assert allclose_report(H_dense[first, second], H_param0_param1 @ torch.eye(len(cols), device=DEVICE))
assert allclose_report(H_dense[first, second], H.block(name0, name1) @ torch.eye(len(cols), device=DEVICE))

# %%
# Arbitrary rows and columns
# --------------------------
#
# The rows and columns of a submatrix need not belong to whole layers. Take any three rows and three columns:

rows, cols = [0, 13, 42], [1, 2, 3]
H_sub = SubmatrixLinearOperator(H, rows, cols)
print(H_sub @ np.eye(len(cols)))
assert allclose_report(H_dense[rows, :][:, cols], H_sub @ torch.eye(len(cols), device=DEVICE))

# %%
# NumPy's indexing gives the same operator:

assert allclose_report(H_dense[rows, :][:, cols], H[rows, :][:, cols] @ torch.eye(len(cols), device=DEVICE))

# %%
# The cost of a submatrix
# -----------------------
#
# A submatrix could be computed by multiplying by the whole Hessian and discarding most of the result. Instead,
# ``curvop`` uses only the parameters to which the rows and columns belong. A product with a block that is sliced from
# ``H`` therefore costs as much as a product with an operator that was created for these parameters only. Alternately
# time products with both operators and with the whole matrix, and compare the medians:


def medians(*functions, repeats=300):
    """Time functions alternately. Return the median time of each function, in seconds."""
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function().cpu()  # waits for the GPU
            times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in seconds]


x = torch.rand(H_param0.shape[1], device=DEVICE)
H_sliced = H[first, first]
assert allclose_report(H_param0 @ x, H_sliced @ x)
restricted, sliced, whole = medians(
    lambda: H_param0 @ x, lambda: H_sliced @ x, lambda: (H @ torch.nn.functional.pad(x, (0, P - len(x))))[first]
)
print(f"operator restricted to {name0}: {1e3 * restricted:.2f} ms per product")
print(f"the same block sliced from H: {1e3 * sliced:.2f} ms per product ({sliced / restricted:.2f} times)")
print(f"product with the whole H, then slicing: {1e3 * whole:.2f} ms per product ({whole / restricted:.2f} times)")
