r"""
Which training images are harmful?
==================================

How would the test loss change if one training image were left out? Koh and Liang (2017, "Understanding black-box
predictions via influence functions", eq. (2)) derive a first-order approximation: leaving out image `n` changes the
test loss by

.. math:: \frac{1}{N} \, \nabla L_\text{test}^\top \, (G + \lambda I)^{-1} \, \nabla \ell_n,

where `N` is the number of training images, `G` is the Gauss-Newton matrix of the training loss, :math:`\lambda` is the
weight decay, and :math:`\ell_n` is the loss of image `n`. The original formula uses the Hessian instead of `G`, but the
Hessian may be indefinite. One linear system and one matrix-vector product are enough for all training images: solve the
system with the gradient of the test loss as the right-hand side, and multiply the matrix of all training gradients by
the solution.

For large models, Grosse et al. (2023, "Studying large language model generalization with influence functions",
arXiv:2308.03296) replace `G` by EKFAC, whose inverse has a closed form. The last section of this example measures what
this approximation costs: it compares the predictions of KFAC, EKFAC and the Gauss-Newton matrix with the actual changes
of the test loss.

The images are scikit-learn's handwritten digits. To create harmful images, we give wrong labels to 25 of the 500
training images.
"""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import spearmanr, t
from sklearn.datasets import load_digits
from torch import nn

from curvop import (
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    PerExampleGradientLinearOperator,
    solve,
)

pixels, labels = load_digits(return_X_y=True)
pixels, labels = torch.from_numpy(pixels / 16), torch.from_numpy(labels)
loss_function = nn.CrossEntropyLoss()
N, num_wrong, decay = 500, 25, 1e-2

# %%
# Train a network with weight decay. The objective includes the penalty of the weight decay. The Hessian of the penalty
# is ``decay`` times the identity matrix, so `G` is damped by ``decay``.


def trained(seed):
    """Train a network on the first `N` images in random order. The first `num_wrong` images have wrong labels."""
    torch.manual_seed(seed)
    order = torch.randperm(len(pixels))
    images, targets = pixels[order], labels[order]
    targets[:num_wrong] = (targets[:num_wrong] + torch.randint(1, 10, (num_wrong,))) % 10
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    params = dict(model.named_parameters())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        penalty = sum((value**2).sum() for value in params.values())
        loss = loss_function(model(images[:N]), targets[:N]) + decay / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    assert max(value.grad.abs().max() for value in params.values()) < 1e-5  # converged
    data, test_data = [(images[:N], targets[:N])], [(images[N:], targets[N:])]
    problem = model, loss_function, params
    test_gradient, test_loss = GGNLinearOperator(*problem, test_data).gradient_and_loss()
    return SimpleNamespace(
        images=images, targets=targets, model=model, params=params, problem=(*problem, data), test_loss=test_loss,
        test_gradient=test_gradient,
    )  # fmt: skip


first = trained(seed=0)
accuracy = (first.model(first.images[N:]).argmax(1) == first.targets[N:]).double().mean()
print(f"accuracy on {len(pixels) - N} test images: {accuracy:.1%}")

# %%
# One linear system
# -----------------
#
# ``gradient_and_loss`` returns the gradient of the test loss as a vector, in the order of the operator's columns.
# ``solve`` solves the system with the Gauss-Newton matrix, and reports the true residual of its solution. EKFAC needs
# two passes over the data, and no solver. The residual of its solution in the exact system is large: EKFAC solves the
# system of another matrix.

G = GGNLinearOperator(*first.problem)
result = solve(G, first.test_gradient, damping=decay, rtol=1e-8, progress=False)
print(result)
approximate = EKFACLinearOperator(*first.problem).inverse(decay) @ first.test_gradient
residual = np.linalg.norm(G @ approximate + decay * approximate - first.test_gradient)
print(f"relative residual of EKFAC's solution: {residual / np.linalg.norm(first.test_gradient):.1f}")

# %%
# One product gives the influence of all training images: the rows of ``PerExampleGradientLinearOperator`` are the
# gradients of all images. The product is computed without forming these gradients.

gradients = PerExampleGradientLinearOperator(*first.problem)
influence = gradients @ result.solution / N

# %%
# The most harmful images
# -----------------------
#
# Plot the 12 images whose removal would lower the test loss the most, according to the predictions. We changed the
# labels of most of these images.

ranked = np.argsort(influence)
hits = np.count_nonzero(ranked[:num_wrong] < num_wrong)
print(f"{hits} of the {num_wrong} most harmful images have a wrong label (5 % of all images do)")
assert hits >= 12

figure, axes = plt.subplots(2, 6, figsize=(9, 3.8), layout="constrained")
for axis, index in zip(axes.flat, ranked[:12], strict=True):
    axis.imshow(first.images[index].reshape(8, 8).numpy(), cmap="gray_r")
    color = "tab:red" if index < num_wrong else "black"
    axis.set_title(f"labeled {first.targets[index]}", color=color, fontsize=10)
    axis.set_axis_off()
figure.suptitle("The most harmful training images (red: the label was changed)")
plt.show()

# %%
# Leave one image out, and retrain
# --------------------------------
#
# The actual change of the test loss is that of a network that is trained without the image. The new minimum is near the
# old one. L-BFGS finds it in few steps in coordinates in which the Hessian of the objective at the old minimum is the
# identity matrix.


def retrained_without(case, left_out):
    """Continue the training without one training image for each index, and return the changes of the test loss."""
    H = HessianLinearOperator(*case.problem)
    values, vectors = np.linalg.eigh(H.to_dense())
    inverse_root = vectors / np.sqrt(np.maximum(values + decay, 1e-4)) @ vectors.T
    start = H.ravel(case.params)
    changes = []
    for index in left_out:
        kept = torch.arange(N) != int(index)
        images, targets = case.images[:N][kept], case.targets[:N][kept]

        def objective(x, images=images, targets=targets):
            params = {name: value.requires_grad_() for name, value in H.unravel(start + inverse_root @ x).items()}
            prediction = torch.func.functional_call(case.model, params, (images,))
            penalty = sum((value**2).sum() for value in params.values())
            loss = nn.functional.cross_entropy(prediction, targets, reduction="sum") / N + decay / 2 * penalty
            gradient = H.ravel(dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)))
            return loss.item(), inverse_root @ gradient

        options = {"maxcor": 30, "gtol": 1e-7, "ftol": 0, "maxiter": 1000}
        found = minimize(objective, np.zeros(len(start)), jac=True, method="L-BFGS-B", options=options)
        assert np.abs(found.jac).max() < 1e-5  # converged
        prediction = torch.func.functional_call(
            case.model, H.unravel(start + inverse_root @ found.x), (case.images[N:],)
        )
        changes.append(loss_function(prediction, case.targets[N:]).item() - case.test_loss)
    return np.array(changes)


# %%
# KFAC, EKFAC and the exact matrix
# --------------------------------
#
# Repeat the experiment with five seeds, which determine the training images, the wrong labels and the initial
# parameters. In each experiment, leave out 10 random images with a wrong label, one at a time, and 20 random other
# images. "No matrix" uses the inner products of the gradients.


def predictions(case):
    """Return the predicted changes of the test loss for all training images, by the name of the matrix."""
    G, b = GGNLinearOperator(*case.problem), case.test_gradient
    solutions = {
        "no matrix": b,
        "KFAC": KFACLinearOperator(*case.problem).inverse(decay) @ b,
        "EKFAC": EKFACLinearOperator(*case.problem).inverse(decay) @ b,
        "Gauss-Newton": solve(G, b, damping=decay, rtol=1e-8, progress=False).solution,
    }
    gradients = PerExampleGradientLinearOperator(*case.problem)
    return {name: gradients @ solution / N for name, solution in solutions.items()}


rows = []
for seed in range(5):
    case = trained(seed)
    generator = np.random.default_rng(seed)
    wrong, others = generator.permutation(num_wrong)[:10], num_wrong + generator.permutation(N - num_wrong)[:20]
    left_out = np.concatenate([wrong, others])
    actual = retrained_without(case, left_out)
    predicted = {name: changes[left_out] for name, changes in predictions(case).items()}
    rows.append([(np.corrcoef(x, actual)[0, 1], spearmanr(x, actual)[0]) for x in predicted.values()])
    if seed == 0:
        shown = predicted, actual

# %%
# The table shows the mean over the seeds and a 95% confidence interval (Student's t). The differences between two
# matrices have smaller intervals than their correlations, because both matrices predict the same changes.

correlations = np.array(rows)  # seed, matrix, kind of correlation


def interval(samples):
    """Return the mean over the seeds with the half width of its confidence interval."""
    half = t.ppf(0.975, len(samples) - 1) * samples.std(ddof=1) / len(samples) ** 0.5
    return f"{samples.mean():.3f} +- {half:.3f}"


names = list(predicted)
print(f"{'':<24}{'correlation':>20}{'rank correlation':>20}")
for index, name in enumerate(names):
    print(f"{name:<24}" + "".join(f"{interval(correlations[:, index, kind]):>20}" for kind in (0, 1)))
for better, worse in ((2, 1), (3, 2)):
    difference = correlations[:, better] - correlations[:, worse]
    label = f"{names[better]} - {names[worse]}"
    print(f"{label:<24}" + "".join(f"{interval(difference[:, kind]):>20}" for kind in (0, 1)))
assert correlations[:, 3, 0].mean() > 0.9 > correlations[:, 0, 0].mean()

# %%
# All three matrices predict the changes much better than the gradients alone. The exact matrix is better than EKFAC.
# The difference between EKFAC and KFAC is smaller than its interval. For other models, Hong et al. (2025, "Better
# Hessians matter: studying the impact of curvature approximations in influence functions", arXiv:2509.23437) find that
# EKFAC is better than KFAC, too.
#
# Plot the predictions against the actual changes for the first seed. A perfect prediction lies on the line. KFAC and
# EKFAC rank the images well, but their predictions are about two times too large. The correlation does not show this.

predicted, actual = (1e3 * np.array(list(shown[0].values())), 1e3 * shown[1])
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), sharex=True, sharey=True, layout="constrained")
for axis, name, changes in zip(axes, names[1:], predicted[1:], strict=True):
    axis.axline((0, 0), slope=1, color="lightgray")
    axis.plot(changes[10:], actual[10:], "o", markersize=4, label="correct label")
    axis.plot(changes[:10], actual[:10], "o", markersize=4, color="tab:red", label="wrong label")
    axis.set(title=name, xlabel=r"predicted change $\times\, 10^3$")
axes[0].set(ylabel=r"actual change $\times\, 10^3$")
axes[0].legend(frameon=False, fontsize=9)
plt.show()
