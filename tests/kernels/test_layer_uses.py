"""Recorded uses of parameters: the sum of g a' over all positions is the gradient that autograd computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from curvop.kernels.layer_uses import NORM, OTHER, UNUSED, Use, UseRecorder


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def recorded(function: Callable[..., Tensor], **params: Tensor) -> tuple[UseRecorder, dict[str, Tensor], Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    recorder = UseRecorder(leaves)
    with recorder:
        output = function(**leaves)
    return recorder, leaves, output


def sums(use: Use, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of g a' and of g over all positions."""
    g = use.gradients(gradient).reshape(-1, use.groups, use.outputs)
    if use.one_hot:
        index = use.indices().reshape(-1)
        a = F.one_hot(index.clamp(min=0), use.inputs).double() * (index >= 0)[:, None]
    else:
        a = use.vectors(use.batched_input())
    a = a.reshape(-1, use.groups, use.inputs)
    return torch.einsum("pgi,pgj->gij", g, a), g.sum(0)


def assert_gradients(function: Callable[..., Tensor], **params: Tensor) -> list[Use]:
    """Check the weight and the bias of all uses of `function` against autograd, for a random cotangent."""
    recorder, leaves, output = recorded(function, **params)
    uses, others = recorder.separate([output])
    assert uses
    assert not others
    cotangent = random(*output.shape)
    gradients = torch.autograd.grad(output, [use.edge for use in uses], cotangent, retain_graph=True)
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for use, gradient in zip(uses, gradients, strict=True):
        weight, bias = sums(use, gradient)
        if use.weight is not None:
            part = weight.transpose(-2, -1) if use.weight.transposed else weight
            rows = slice(*use.weight.rows) if use.weight.rows else slice(None)
            target = totals[use.weight.name][rows]
            target += part.reshape(target.shape)
        if use.bias is not None:
            rows = slice(*use.bias.rows) if use.bias.rows else slice(None)
            totals[use.bias.name][rows] += bias.reshape(-1)
    for name, expected in zip(leaves, torch.autograd.grad(output, list(leaves.values()), cotangent), strict=True):
        torch.testing.assert_close(totals[name], expected, rtol=1e-12, atol=1e-12)
    return uses


OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...] | None]] = {
    "linear": (lambda w, b: F.linear(random(5, 3), w, b), (4, 3), (4,)),
    "linear-tokens": (lambda w, b: F.linear(random(2, 5, 3), w, b), (4, 3), (4,)),
    "linear-vector": (lambda w, b: F.linear(random(3), w, b), (4, 3), (4,)),
    "matmul": (lambda w: random(2, 5, 3) @ w, (3, 4), None),
    "matmul-transpose": (lambda w: random(5, 3) @ w.T, (4, 3), None),
    "matmul-left": (lambda w: w @ random(2, 3, 5), (4, 3), None),
    "matmul-vector": (lambda w: torch.matmul(w, random(3)), (4, 3), None),
    "mm": (lambda w: torch.mm(random(5, 3), w), (3, 4), None),
    "addmm": (lambda w, b: torch.addmm(b, random(5, 3), w), (3, 4), (4,)),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 2, 2], [5, 1, 0]]), w), (6, 4), None),
    "embedding-padding": (lambda w: F.embedding(torch.tensor([0, 2, 2, 5]), w, padding_idx=-4), (6, 4), None),
    "conv1d": (lambda w, b: F.conv1d(random(2, 3, 9), w, b, stride=2, padding=1, dilation=2), (4, 3, 3), (4,)),
    "conv2d": (lambda w, b: F.conv2d(random(2, 3, 6, 7), w, b, stride=(2, 1), padding=(0, 2)), (4, 3, 2, 3), (4,)),
    "conv2d-groups": (lambda w, b: F.conv2d(random(2, 4, 5, 5), w, b, groups=2, dilation=2), (6, 2, 2, 2), (6,)),
    "conv2d-depthwise": (lambda w: F.conv2d(random(2, 3, 5, 5), w, groups=3), (6, 1, 3, 3), None),
    "conv2d-same": (lambda w: F.conv2d(random(2, 3, 5, 5), w, padding="same", dilation=(1, 3)), (4, 3, 3, 2), None),
    "conv2d-valid": (lambda w: F.conv2d(random(2, 3, 5, 5), w, padding="valid"), (4, 3, 1, 1), None),
    "conv2d-strided-input": (lambda w: F.conv2d(random(5, 6, 3, 2).permute(3, 2, 1, 0), w), (4, 3, 2, 2), None),
    "conv2d-one-image": (lambda w, b: F.conv2d(random(3, 5, 5), w, b, padding=1), (4, 3, 3, 3), (4,)),
    "conv3d": (lambda w, b: F.conv3d(random(2, 3, 4, 5, 3), w, b, padding=(1, 0, 1)), (4, 3, 2, 3, 1), (4,)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_sums_over_positions(name: str) -> None:
    function, weight, bias = OPERATIONS[name]
    params = {"w": random(*weight)} | ({} if bias is None else {"b": random(*bias)})
    assert len(assert_gradients(function, **params)) == 1


BIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda w, b: F.linear(random(4, 3), w.T, b),
    "addmm": lambda w, b: torch.addmm(b, random(4, 3), w),
    "method": lambda w, b: b.addmm(random(4, 3), w),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("shape", [(1,), (4, 1), (4, 4), (), (1, 1)], ids=str)
def test_a_bias_that_is_broadcast_has_another_use(name: str, shape: tuple[int, ...]) -> None:
    recorder, leaves, output = recorded(BIASES[name], w=random(3, 4), b=random(*shape))
    [use], others = recorder.separate([output])
    assert use.bias is None
    assert others == {"b": OTHER}
    cotangent = random(*output.shape)
    gradient, expected = torch.autograd.grad(output, [use.edge, leaves["w"]], cotangent)
    weight = sums(use, gradient)[0][0]
    torch.testing.assert_close(weight.T if use.weight and use.weight.transposed else weight, expected)


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_with_one_row(name: str) -> None:
    [use] = assert_gradients(BIASES[name], w=random(3, 4), b=random(1, 4))
    assert use.bias is not None


def test_vectors_of_a_convolution_are_patches() -> None:
    x, w = random(2, 4, 6, 5), random(6, 2, 3, 2)
    recorder, _, _ = recorded(lambda w: F.conv2d(x, w, groups=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), w=w)
    [use] = recorder.uses
    vectors, padded = use.vectors(x), F.pad(x, (0, 0, 1, 1))
    for n in range(2):
        for i in range(vectors.shape[1]):
            for j in range(vectors.shape[2]):
                for group in range(2):
                    channels = padded[n, 2 * group : 2 * group + 2]
                    patch = torch.stack(
                        [channels[:, 2 * i + k, j + 2 * step] for k in range(3) for step in range(2)], 1
                    )
                    torch.testing.assert_close(vectors[n, i, j, group], patch.reshape(-1), rtol=0, atol=0)


class TestAttention:
    @pytest.mark.parametrize("kind", ["self", "keys", "all"])
    def test_projections(self, kind: str) -> None:
        layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        x = random(2, 5, 4)
        key = x if kind == "self" else x.sin()
        value = key if kind != "all" else x.cos()

        def attend(**params: Tensor) -> Tensor:
            return torch.func.functional_call(layer, params, (x, key, value))[0]

        # The key's bias has no effect, so both gradients are zero up to rounding errors.
        uses = assert_gradients(attend, **dict(layer.named_parameters()))
        assert len(uses) == {"self": 2, "keys": 3, "all": 4}[kind]

    def test_separate_dimensions(self) -> None:
        layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False, dtype=torch.float64)

        def attend(**params: Tensor) -> Tensor:
            return torch.func.functional_call(layer, params, (random(6, 2, 4), random(7, 2, 3), random(7, 2, 5)))[0]

        assert len(assert_gradients(attend, **dict(layer.named_parameters()))) == 4


class TestComposition:
    def test_a_weight_that_is_used_as_its_transpose(self) -> None:
        uses = assert_gradients(lambda w: F.linear(F.embedding(torch.tensor([0, 3, 1]), w).sin(), w), w=random(5, 4))
        assert [use.weight.transposed for use in uses if use.weight] == [True, False]

    def test_outputs_that_are_modified_in_place(self) -> None:
        def function(w: Tensor, v: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(random(5, 3), w).mul_(2.0), inplace=True).view(5, 2, 2)[:, 0], v)

        assert_gradients(function, w=random(4, 3), v=random(3, 2))

    def test_layers_that_are_computed_again_in_the_backward_pass(self) -> None:
        def function(w: Tensor, v: Tensor) -> Tensor:
            inner = checkpoint(lambda x: F.linear(x, w).tanh(), random(5, 3), use_reentrant=False)
            assert isinstance(inner, Tensor)
            return F.linear(inner, v)

        assert_gradients(function, w=random(4, 3), v=random(3, 4))

    def test_parameters_that_are_used_in_other_ways(self) -> None:
        def function(w: Tensor, v: Tensor, scale: Tensor, gain: Tensor, shift: Tensor, rest: Tensor) -> Tensor:
            x = F.linear(random(5, 3), w)
            x = F.layer_norm(x, (4,), gain.abs(), shift.abs()) * scale
            return F.linear(x, v * 2) + w.sum()

        params = {"w": (4, 3), "v": (4, 4), "scale": (4,), "gain": (4,), "shift": (4,), "rest": (2,)}
        recorder, _, output = recorded(function, **{name: random(*shape) for name, shape in params.items()})
        uses, others = recorder.separate([output])
        assert [use.name for use in uses] == ["w"]
        used = dict.fromkeys(["w", "v", "scale", "gain", "shift"], OTHER)
        assert others == used | {"rest": UNUSED}

    def test_normalizations(self) -> None:
        def function(w: Tensor, b: Tensor) -> Tensor:
            x = F.layer_norm(random(2, 5, 3), (3,), w, b)
            return F.rms_norm(F.group_norm(x.mT, 3, w, b).mT, (3,), weight=w)

        assert all(use.is_norm for use in assert_gradients(function, w=random(3), b=random(3)))
        mean, variance = random(3), random(3).square()
        copy = mean.clone()
        assert_gradients(lambda w, b: F.batch_norm(random(5, 3, 4), mean, variance, w, b), w=random(3), b=random(3))
        assert_gradients(
            lambda w, b: F.batch_norm(random(5, 3), None, None, w, b, training=True), w=random(3), b=random(3)
        )
        torch.testing.assert_close(mean, copy)

    def test_normalizations_of_several_axes(self) -> None:
        recorder, _, output = recorded(lambda w: F.layer_norm(random(5, 3, 2), (3, 2), w), w=random(3, 2))
        assert recorder.separate([output]) == ([], {"w": NORM})

    @pytest.mark.parametrize("add", [torch.add, torch.Tensor.__iadd__, lambda x, y: y + x])
    def test_embeddings_of_positions(self, add: Callable[..., Tensor]) -> None:
        """An embedding that all data items share has one gradient for each item."""

        def function(w: Tensor, v: Tensor) -> Tensor:
            return add(F.linear(random(2, 5, 3), v), F.embedding(torch.arange(5), w)).sin()

        uses = assert_gradients(function, w=random(6, 4), v=random(4, 3))
        assert [use.shape for use in uses] == [(2, 5, 4), (2, 5, 4)]

    def test_embeddings_of_positions_with_other_uses(self) -> None:
        def twice(w: Tensor) -> Tensor:
            places = F.embedding(torch.arange(5), w)
            return (random(2, 5, 4) + places) * places

        recorder, _, output = recorded(twice, w=random(6, 4))
        assert recorder.separate([output])[1] == {"w": OTHER}

        def modified(w: Tensor, v: Tensor) -> Tensor:
            places = F.embedding(torch.arange(5), w)
            places += F.linear(random(5, 3), v)
            return random(2, 5, 4) + places

        assert_gradients(modified, w=random(6, 4), v=random(4, 3))

    def test_a_product_of_two_parameters(self) -> None:
        recorder, _, output = recorded(lambda w, v: random(5, 3) @ (w @ v), w=random(3, 4), v=random(4, 2))
        uses, others = recorder.separate([output])
        assert [use.name for use in uses] == ["v"]
        assert others == {"w": OTHER}

    def test_outputs_without_effect_are_left_out(self) -> None:
        def function(w: Tensor, v: Tensor) -> Tensor:
            F.linear(random(7, 3), w)
            F.linear(random(7, 3), v)
            return F.linear(random(5, 3), w)

        recorder, _, output = recorded(function, w=random(4, 3), v=random(4, 3))
        uses, others = recorder.separate([output])
        assert [use.shape for use in uses] == [(5, 4)]
        assert others == {"v": UNUSED}

    def test_some_rows_and_other_views(self) -> None:
        def function(w: Tensor, b: Tensor) -> Tensor:
            return F.linear(F.linear(random(5, 3), w[2:5], b[2:5]), w[:2])

        recorder, _, output = recorded(function, w=random(5, 3), b=random(5))
        uses, others = recorder.separate([output])
        assert [use.weight and use.weight.rows for use in uses] == [(2, 5), (0, 2)]
        assert not others
        recorder, _, output = recorded(lambda w: F.linear(random(5, 2), w[:, 1:]), w=random(4, 3))
        assert recorder.separate([output]) == ([], {"w": OTHER})

    def test_an_input_that_is_modified_later(self) -> None:
        def function(w: Tensor) -> Tensor:
            x = random(5, 3)
            output = F.linear(x, w)
            x.zero_()
            return output

        recorder, _, _ = recorded(function, w=random(4, 3))
        with pytest.raises(RuntimeError, match="modifies the input of the layer"):
            recorder.uses[0].check_version()

    def test_a_repeated_evaluation_replaces_the_records(self) -> None:
        w = random(4, 3).requires_grad_()
        recorder = UseRecorder({"w": w})
        for _ in range(2):
            with recorder:
                F.linear(random(5, 3), w)
        assert len(recorder.uses) == 1

    def test_the_mode_ends_after_an_exception(self) -> None:
        depth = torch._C._len_torch_function_stack()
        with pytest.raises(ZeroDivisionError), UseRecorder({}):
            _ = 1 / 0
        assert torch._C._len_torch_function_stack() == depth
