r"""
As many outliers as classes
===========================

The Hessian of a classifier has a bulk of small eigenvalues. Above this bulk, there are about as many outliers as
classes, or one fewer. Sagun, Bottou, LeCun (2016) and Sagun et al. (2017) discovered these outliers, and Papyan (2018,
2020) explained them by the class means of the gradients. This example counts the outliers for small convolutional
networks that are trained on images of 4, 6 or 10 different digits.

``density`` shows all eigenvalues at once. ``eigsh`` computes the outliers, and certifies that no outlier is missing.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvop import HessianLinearOperator
from curvop.spectrum import density, eigsh

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)


def trained(classes, epochs=3):
    """Train a network briefly on images of the first `classes` digits, and return its Hessian."""
    X, y = images[labels < classes], labels[labels < classes]
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, classes)),
    )
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            loss_function(model(X[batch]), y[batch]).backward()
            optimizer.step()
    return HessianLinearOperator(model, loss_function, model.parameters(), [(X, y)])


# %%
# Count the outliers, which are the eigenvalues above the largest gap. The eigenvalues are in ascending order, and the
# largest gap lies between the two consecutive eigenvalues with the largest ratio.

figure, axes = plt.subplots(3, 1, figsize=(8, 7), layout="constrained")
for axis, classes in zip(axes, (4, 6, 10), strict=True):
    H = trained(classes)
    found = eigsh(H, 16, "LA", tol=1e-4, progress=False)
    bulk = 1 + int(np.argmax(found.values[1:] / found.values[:-1]))  # number of eigenvalues below the gap
    outliers = len(found.values) - bulk
    print(f"{classes} classes, {H.shape[0]:,} parameters: {outliers} outliers; {found.verdict}")
    assert classes - 1 <= outliers <= classes
    assert found.ok
    density(H, num_probes=3, num_steps=60, rng=0, progress=False).plot(axis)
    axis.plot(found.values[bulk:], np.full(outliers, axis.get_ylim()[0] * 1.3), "v", color="tab:red")
    axis.set_title(f"{classes} classes: {outliers} outliers")
plt.show()
