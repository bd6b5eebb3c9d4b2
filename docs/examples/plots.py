r"""
Plots
=====

Every result has a method ``plot``. It draws on the axes ``ax`` or creates a figure, and returns the axes. All methods
take ``label`` and ``color``. Further arguments are properties of a Matplotlib line, for example ``linewidth=2``. Change
everything else with Matplotlib.

The default colors are those of Okabe and Ito (2008), which readers with any kind of color blindness can tell apart.

The matrices in the pictures belong to a small network that classifies images of digits.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from curvop import GGNLinearOperator, HessianLinearOperator, KFACLinearOperator, spectrum
from curvop.problems import digits

problem = digits()
H, G = HessianLinearOperator(**problem), GGNLinearOperator(**problem)

# %%
# A density
# ---------
#
# Most eigenvalues are close to zero, and a few outliers are much larger. The ticks at the upper edge show the
# eigenvalues that are known exactly, here the ten of largest magnitude. The band shows the error of the density. Each
# eigenvalue is replaced by a normal distribution with the standard deviation ``sigma``, which the legend gives.

spectrum.density(H, deflate=10, rng=0, progress=False).plot()
plt.show()

# %%
# Two densities
# -------------
#
# Plot both on the same axes, with the same ``sigma``. The outliers of the GGN are close to those of the Hessian, but a
# little smaller. A larger ``sigma`` gives a smoother curve with a narrower band.

hessian, ggn = (spectrum.density(A, rng=0, progress=False) for A in (H, G))
axes = hessian.plot(label="Hessian", sigma=0.005)
ggn.plot(axes, label="GGN", sigma=0.005, linestyle="--")
plt.show()

# %%
# Eigenvalues with error bars
# ---------------------------
#
# Each result of ``eigsh`` is a row of ticks. The error bars are the bounds of the certificate. With a loose tolerance,
# the bars of two eigenvalues are visible. By default, the bars are narrower than a tick.

loose = spectrum.eigsh(H, 8, "LA", method="lobpcg", tol=0.3, progress=False)
tight = spectrum.eigsh(H, 8, "LA", progress=False)
axes = loose.plot(label="LOBPCG, tol=0.3")
tight.plot(axes, label="default")
plt.show()

# %%
# The rows are below the upper edge, so you can add them to a density. Here, the ticks show that each peak on the right
# is a single eigenvalue.

axes = hessian.plot(label="density")
tight.plot(axes, label="largest eigenvalues")
plt.show()

# %%
# A scree plot
# ------------
#
# With ``kind="scree"``, the magnitudes are plotted against their index. The open circles are negative eigenvalues.
# Their magnitudes are about 0.002, much smaller than the 15 largest eigenvalues. With ``log=False``, the plot shows the
# values themselves.

ends = spectrum.eigsh(H, 30, "BE", progress=False)
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
ends.plot(left, "scree", label="both ends")
loose.plot(left, "scree", label="LOBPCG", marker="s", mfc="none", markersize=8)
ends.plot(right, "scree", log=False, label="both ends")
plt.show()

# %%
# Sharpness during training
# -------------------------
#
# A tracker shows the sharpness, and as a dashed line of the same color the threshold above which gradient descent is
# unstable. With the larger learning rate, the sharpness reaches its threshold and stays there. The pale lines are the
# second eigenvalues.


def train(learning_rate, steps=600):
    """Train a new network by full-batch gradient descent, and return the tracker."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    X, y = (torch.cat(parts) for parts in zip(*problem["data"], strict=True))
    target, loss_function = nn.functional.one_hot(y, 10).double(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    tracker = spectrum.track(HessianLinearOperator(model, loss_function, model.parameters(), [(X, target)]), 2)
    for _ in range(steps):
        tracker.step()
        optimizer.zero_grad()
        loss_function(model(X), target).backward()
        optimizer.step()
    return tracker


figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for learning_rate in (0.5, 1.0):
    train(learning_rate).plot(axes, learning_rate, label=f"lr {learning_rate}")
plt.show()

# %%
# The layers of a Kronecker-factored matrix
# -----------------------------------------
#
# Each line is a layer. The eigenvalues of the first layer span more orders of magnitude than those of the last one.

KFACLinearOperator(**problem).eigenvalues().plot()
plt.show()

# %%
# The blocks of a matrix
# ----------------------
#
# The table has one row for each diagonal block, with the density of the block next to it. The image shows the norms of
# all blocks: a pale square off the diagonal means that two parameters are strongly coupled.

study = spectrum.blocks(H, progress=False)
study.plot()
plt.show()

# %%
# A figure for a paper
# --------------------
#
# The text stays readable at the width of a column (3.3 inches). Save the figure as PDF or SVG, so that lines and text
# are not rendered to pixels: ``figure.savefig("spectrum.pdf")``. Draw the image of norms alone with ``plot_norms``.

with plt.rc_context({"font.size": 8}):
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(3.3, 4.6), layout="constrained")
    hessian.plot(upper, label="Hessian")
    study.plot_norms(lower, cmap="cividis")
plt.show()
