"""Kronecker factors against plain ``torch.func`` code that follows their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from curvop.kernels.factor_sums import FactorSums, sum_factors
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel, SampledFisherKernel
from curvop.kernels.ggn_kernel import GGNKernel
from curvop.kernels.layer_factors import FactorSettings
from curvop.kernels.model_objective import ModelObjective


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def classes(count: int, *shape: int) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(1))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def factors_of(
    model: Any, loss: Any, params: dict[str, Tensor], data: list[Any], kernel: Any = GGNKernel, **settings: Any
) -> FactorSums:
    objective = ModelObjective(model, loss, params, data)
    names = list(params)
    return sum_factors(kernel(objective, names, names), names, FactorSettings(**settings))


def two_layers(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"]) @ params["v"]


def reference(x: Tensor, loss: Callable[[Tensor, int], Tensor], params: dict[str, Tensor]) -> dict[str, Any]:
    """Return the inputs of both layers, and sum_c g g' for each row of x, by ``torch.func``."""
    w, v = params["w"], params["v"]
    inputs = {"w": x, "v": torch.tanh(x @ w)}
    terms: dict[str, list[Tensor]] = {"w": [], "v": []}
    for n, row in enumerate(x):
        prediction = torch.tanh(row @ w) @ v
        curvature = jacrev(jacrev(lambda z, n=n: loss(z, n)))(prediction)
        for name, output, rest in (
            ("w", row @ w, lambda s: torch.tanh(s) @ v),
            ("v", torch.tanh(row @ w) @ v, lambda s: s),
        ):
            jacobian = jacrev(rest)(output)
            terms[name].append(jacobian.T @ curvature @ jacobian)
    return {name: (inputs[name], torch.stack(terms[name])) for name in terms}


PARAMS = {"w": random(4, 5), "v": random(5, 3)}
WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)


class TestDefinition:
    @pytest.mark.parametrize("sizes", [(8,), (5, 3), (1,) * 8])
    def test_cross_entropy_with_class_weights_and_ignored_targets(self, sizes: tuple[int, ...]) -> None:
        x, y = random(8, 4), classes(3, 8)
        y[[1, 6]] = -100
        loss_function = nn.CrossEntropyLoss(weight=WEIGHT)
        data = list(zip(x.split(sizes), y.split(sizes), strict=True))
        sums = factors_of(two_layers, loss_function, PARAMS, data)
        total = WEIGHT[y[y >= 0]].sum()

        def loss(z: Tensor, n: int) -> Tensor:
            return nn.functional.cross_entropy(z, y[n], WEIGHT, reduction="sum") if y[n] >= 0 else 0 * z.sum()

        kept = y >= 0 if sizes[0] == 1 else torch.ones(8, dtype=torch.bool)  # batches without targets are left out
        for layer in sums.layers:
            inputs, terms = reference(x, loss, PARAMS)[layer.layout.names[0]]
            close(layer.output[0], terms.sum(0) / total)
            close(layer.input[0], inputs[kept].T @ inputs[kept] / kept.sum())

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_squared_error(self, reduction: str) -> None:
        x, y = random(6, 4), random(6, 3)
        sums = factors_of(two_layers, nn.MSELoss(reduction=reduction), PARAMS, [(x[:4], y[:4]), (x[4:], y[4:])])
        for layer in sums.layers:
            inputs, terms = reference(x, lambda z, n: (z - y[n]).square().sum(), PARAMS)[layer.layout.names[0]]
            close(layer.output[0], terms.sum(0) / (18 if reduction == "mean" else 1))
            close(layer.input[0], inputs.T @ inputs / 6)

    def test_a_loss_of_the_user(self) -> None:
        x, y = random(6, 4), random(6, 3)

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return ((z - y) ** 4).sum(-1).mean() + z.logsumexp(-1).mean()

        sums = factors_of(two_layers, loss, PARAMS, [(x[:4], y[:4]), (x[4:], y[4:])])
        for layer in sums.layers:
            _, terms = reference(x, lambda z, n: loss(z[None], y[n][None]), PARAMS)[layer.layout.names[0]]
            close(layer.output[0], terms.sum(0) / 6)

    @pytest.mark.parametrize(
        "loss",
        [
            nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT),
            nn.SmoothL1Loss(),
            nn.PoissonNLLLoss(),
            nn.CrossEntropyLoss(label_smoothing=0.2),
        ],
        ids=lambda loss: type(loss).__name__,
    )
    def test_the_columns_of_a_loss_are_a_root_of_its_hessian(self, loss: nn.Module) -> None:
        x, y = random(5, 4), random(5, 3).sigmoid()
        [layer] = factors_of(lambda params, x: x @ params["w"], loss, {"w": random(4, 3)}, [(x, y)]).layers
        z = x @ random(4, 3)
        blocks = jacrev(jacrev(lambda z: loss(z, y)))(z)
        close(layer.output[0], sum(blocks[n, :, n] for n in range(5)))

    def test_empirical(self) -> None:
        x, y = random(6, 4), classes(3, 6)
        sums = factors_of(two_layers, nn.CrossEntropyLoss(), PARAMS, [(x, y)], EmpiricalFisherKernel)
        z = torch.tanh(x @ PARAMS["w"]) @ PARAMS["v"]
        residuals = z.softmax(1) - nn.functional.one_hot(y, 3)
        close(sums.layers[1].output[0], residuals.T @ residuals / 6)

    def test_factors_that_are_summed_in_panels(self) -> None:
        x, w, v = random(40, 150), random(150, 130), random(130, 3)
        data = [(x, random(40, 3))]
        [layer] = factors_of(lambda params, x: x @ params["w"] @ v, nn.MSELoss(), {"w": w}, data).layers
        close(layer.input[0], x.T @ x / 40)
        close(layer.output[0], 2 / 3 * v @ v.T)

    def test_forward_only(self) -> None:
        x = random(6, 4)
        sums = factors_of(two_layers, nn.MSELoss(), PARAMS, [(x, random(6, 3))], forward_only=True)
        close(sums.layers[0].output[0], torch.eye(5).double())
        close(sums.layers[0].input[0], x.T @ x / 6)

    def test_samples_agree_with_their_expectation(self) -> None:
        x, y = random(6, 4), classes(3, 6)
        exact = factors_of(two_layers, nn.CrossEntropyLoss(), PARAMS, [(x, y)])
        draws = [
            factors_of(
                *(two_layers, nn.CrossEntropyLoss(), PARAMS, [(x, y)]),
                lambda objective, rows, cols, seed=seed: SampledFisherKernel(objective, rows, cols, 1, seed),
            )
            for seed in range(200)
        ]
        for index, layer in enumerate(exact.layers):
            values = torch.stack([draw.layers[index].output for draw in draws])
            errors = values.std(0) / 200**0.5
            assert bool(((values.mean(0) - layer.output).abs() <= 5 * errors + 1e-12).all())


class TestPositions:
    """Five positions for each of four data items."""

    x = random(4, 5, 3)

    def test_expand_and_reduce(self) -> None:
        params = {"w": random(3, 2)}

        def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.tanh(x @ params["w"]).mean(1)

        data = [(self.x[:3], random(3, 2)), (self.x[3:], random(1, 2))]
        expand, reduce = (factors_of(model, nn.MSELoss(), params, data, sharing=way) for way in ("expand", "reduce"))
        g = (1 - torch.tanh(self.x @ params["w"]) ** 2) / 5  # one entry of the prediction depends on one entry of g
        flat, mean = self.x.reshape(-1, 3), self.x.mean(1)
        close(expand.layers[0].input[0], flat.T @ flat / 20)
        close(expand.layers[0].output[0], torch.diag(2 * g.square().sum((0, 1)) / 8))
        close(reduce.layers[0].input[0], mean.T @ mean / 4)
        close(reduce.layers[0].output[0], torch.diag(2 * g.sum(1).square().sum(0) / 8))

    def test_convolutions_with_reduction(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2), nn.Tanh(), nn.Flatten()).double()
        x = random(3, 2, 5, 5)
        params = dict(model.named_parameters())
        [layer] = factors_of(model, nn.MSELoss(), params, [(x, random(3, 36))], sharing="reduce").layers
        patches = nn.functional.unfold(x, 3, padding=1, stride=2).unflatten(1, (2, 9)).mean(-1)
        patches = torch.cat([patches, torch.ones(3, 2, 1).double()], -1)
        close(layer.input, torch.einsum("ngi,ngj->gij", patches, patches) / 3)

    def test_large_factors_are_diagonal(self) -> None:
        model = nn.Sequential(nn.Embedding(7, 3, padding_idx=1), nn.Flatten(), nn.Linear(12, 2)).double()
        index = classes(7, 6, 4)
        params = dict(model.named_parameters())
        for sharing in ("expand", "reduce"):
            full, limited = (
                factors_of(model, nn.MSELoss(), params, [(index, random(6, 2))], sharing=sharing, max_factor=limit)
                for limit in (100, 6)
            )
            assert [layer.input.ndim for layer in full.layers] == [2 if sharing == "expand" else 3, 3]
            for wide, narrow in zip(full.layers, limited.layers, strict=True):
                assert narrow.input.ndim == 2
                expected = wide.input if wide.input.ndim == 2 else wide.input.diagonal(dim1=1, dim2=2)
                close(narrow.input, expected)
        kept = index[index != 1]  # the padding is no position
        [layer, _] = factors_of(model, nn.MSELoss(), params, [(index, random(6, 2))]).layers
        close(layer.input[0], torch.bincount(kept, minlength=7).double() / len(kept))
        weights = model[2].weight.detach().unflatten(1, (4, 3))  # outputs, positions, features
        gradients = weights.expand(6, 2, 4, 3).movedim(2, 1)[index != 1]
        close(layer.output[0], 2 / 12 * torch.einsum("pci,pcj->ij", gradients, gradients))


class TestCrossEntropy:
    @pytest.mark.parametrize(
        "logits", [[0.3, -1.0, 2.0, 0.1], [0.0, -900.0, 3.0, -900.0], [9.0, -900.0, -900.0, -900.0], [60.0, 0.0, 0, 1]]
    )
    def test_one_backward_pass_less_than_classes(self, logits: list[float]) -> None:
        """One linear layer, whose output factor is the Hessian of the loss. Probabilities may underflow."""
        z = torch.tensor([logits, logits[::-1]], dtype=torch.float64)
        passes = []

        def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
            prediction = nn.functional.linear(x, params["w"])
            prediction.register_hook(passes.append)
            return prediction

        data, weight = [(torch.eye(2).double(), torch.tensor([0, 3]))], torch.tensor([0.5, 1, 1, 2]).double()
        [layer] = factors_of(model, nn.CrossEntropyLoss(weight), {"w": z.T.contiguous()}, data).layers
        assert len(passes) - len(logits) + 1 in (0, 2)  # two more passes may look for the data items
        p = z.softmax(1)
        terms = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        close(layer.output[0], (weight[0] * terms[0] + weight[3] * terms[1]) / 2.5)


class TestRefusals:
    def test_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("curvop.kernels.factor_sums.free_bytes", lambda device: 300)
        with pytest.raises(MemoryError, match="max_factor"):
            factors_of(two_layers, nn.MSELoss(), PARAMS, [(random(6, 4), random(6, 3))])
        factors_of(two_layers, nn.MSELoss(), PARAMS, [(random(6, 4), random(6, 3))], max_factor=2)


@pytest.mark.parametrize("joint_bias", [True, False])
def test_a_bias_that_is_used_apart_from_its_weight(joint_bias: bool) -> None:
    params = {"w": random(3, 3), "b": random(3)}

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return nn.functional.linear(x, params["w"], params["b"] if len(x) > 1 else None)

    data = [(random(2, 3), random(2, 3)), (random(1, 3), random(1, 3))]
    first, second = factors_of(model, nn.MSELoss(), params, data, joint_bias=joint_bias).layers
    assert (first.layout.names, second.layout.names) == (("w",), ("b",))
    X = torch.cat([x for x, _ in data])
    close(first.input[0], X.T @ X / 3)
    close(first.output[0], 2 / 3 * torch.eye(3, dtype=torch.float64))
    close(second.input[0] * second.output[0], 2 / 3 * 2 / 3 * torch.eye(3, dtype=torch.float64))
