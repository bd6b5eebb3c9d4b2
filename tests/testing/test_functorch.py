"""`functorch_hessian` is the Hessian of the loss of the whole data set, for any model."""

import warnings
from collections import UserDict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

from curvop.examples.functorch import functorch_hessian
from curvop.testing import functorch_reference

EXAMPLES, FEATURES, CLASSES, STEPS, WORDS = 7, 3, 2, 4, 5
MSE = nn.MSELoss()
BACKENDS = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled


@pytest.fixture(autouse=True)
def _double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def double_backward(loss, model):
    """Differentiate the gradient of `loss` with respect to the model's own parameters in reverse mode, row by row."""

    def flat(outputs, **options):
        parts = torch.autograd.grad(outputs, list(model.parameters()), materialize_grads=True, **options)
        return torch.cat([part.reshape(-1) for part in parts])

    gradient = flat(loss, create_graph=True)
    return torch.stack([flat(gradient, grad_outputs=e, retain_graph=True) for e in torch.eye(gradient.numel())])


def assert_same(actual, expected):
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item())


def hessian(model, loss, *batches):
    return functorch_hessian(model, loss, dict(model.named_parameters()), batches)


def unequal_batches(X, y):
    return [(X[:2], y[:2]), (X[2:], y[2:])]


def assert_agrees_with_double_backward(model, loss, X, y):
    with sdpa_kernel(SDPBackend.MATH):
        expected = double_backward(loss(model(X), y), model)
    assert_same(hessian(model, loss, *unequal_batches(X, y)), expected)


def regression_data():
    return torch.randn(EXAMPLES, FEATURES), torch.randn(EXAMPLES, CLASSES)


class Model(nn.ModuleDict):
    """A module with submodules `parts` and the forward ``function(self, X)``."""

    def __init__(self, function, **parts):
        super().__init__(parts)
        self.function = function

    def forward(self, X):
        return self.function(self, X)


def mlp(*middle):
    return nn.Sequential(nn.Linear(FEATURES, 4), *middle, nn.Tanh(), nn.Linear(4, CLASSES))


def over_time(encode, width=4, **parts):
    """The time average of an encoding of sequences, followed by a linear layer."""
    return Model(lambda m, X: m.readout(encode(m, X).mean(1)), **parts, readout=nn.Linear(width, CLASSES))


def transformer():
    return over_time(lambda m, X: m.layer(X), layer=nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True))


MODELS = {
    "mlp": mlp,
    "layer norm": lambda: mlp(nn.LayerNorm(4)),
    "rms norm": lambda: mlp(nn.RMSNorm(4)),
    "batch norm, evaluation": lambda: mlp(nn.BatchNorm1d(4)).eval(),
    "batch norm, training": lambda: mlp(nn.BatchNorm1d(4)),
    "group norm and SiLU": lambda: mlp(nn.GroupNorm(2, 4), nn.SiLU()),
    "instance norm": lambda: over_time(lambda m, X: m.norm(X) ** 3, norm=nn.InstanceNorm1d(STEPS, affine=True)),
    "convolution": lambda: over_time(lambda m, X: m.conv(X).tanh(), 3, conv=nn.Conv1d(STEPS, 3, 2)),
    "LSTM": lambda: over_time(lambda m, X: m.rnn(X)[0], 3, rnn=nn.LSTM(4, 3, batch_first=True)),
    "GRU": lambda: over_time(lambda m, X: m.rnn(X)[0], 3, rnn=nn.GRU(4, 3, batch_first=True)),
    "multi-head": lambda: over_time(lambda m, X: m.a(X, X, X)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
    "fused attention": lambda: over_time(lambda m, X: attention(*m.qkv(X).chunk(3, -1)), qkv=nn.Linear(4, 12)),
    "transformer, training": transformer,
    "transformer, evaluation": lambda: transformer().eval(),
    "embedding": lambda: over_time(lambda m, X: m.embed(X).tanh(), embed=nn.Embedding(WORDS, 4)),
    "embedding with padding": lambda: over_time(lambda m, X: m.embed(X).tanh(), embed=nn.Embedding(WORDS, 4, -WORDS)),
}


def make(name):
    model = MODELS[name]()
    X, y = regression_data()
    if isinstance(model, Model):
        X = torch.randint(WORDS, (EXAMPLES, STEPS)) if "embedding" in name else torch.randn(EXAMPLES, STEPS, 4)
    return model, X, y


class Sine(torch.autograd.Function):
    """An operation with a forward-mode derivative that vmap cannot batch."""

    forward = staticmethod(lambda x: x.sin())
    setup_context = staticmethod(lambda ctx, xs, _: (ctx.save_for_backward(*xs), ctx.save_for_forward(*xs)))
    backward = jvp = staticmethod(lambda ctx, along: along * ctx.saved_tensors[0].cos())


class TestClosedForms:
    @pytest.mark.parametrize(("reduction", "scale"), [("mean", 2 / (EXAMPLES * CLASSES)), ("sum", 2)])
    def test_linear_regression(self, reduction, scale):
        X, y = regression_data()
        model, eye = nn.Linear(FEATURES, CLASSES), torch.eye(CLASSES)
        mixed = torch.kron(eye, X.sum(0)[:, None])
        rows = [torch.cat([torch.kron(eye, X.T @ X), mixed], 1), torch.cat([mixed.T, EXAMPLES * eye], 1)]
        assert_same(hessian(model, nn.MSELoss(reduction=reduction), *unequal_batches(X, y)), scale * torch.cat(rows))

    @pytest.mark.parametrize(("reduction", "divisor"), [("mean", EXAMPLES), ("sum", 1)])
    def test_softmax_regression(self, reduction, divisor):
        X, y = torch.randn(EXAMPLES, FEATURES), torch.randint(CLASSES, (EXAMPLES,))
        model = nn.Linear(FEATURES, CLASSES, bias=False)
        pairs = zip(model(X).softmax(-1).detach(), X, strict=True)
        terms = [torch.kron(p.diag() - p.outer(p), x.outer(x)) for p, x in pairs]
        loss = nn.CrossEntropyLoss(reduction=reduction)
        assert_same(hessian(model, loss, *unequal_batches(X, y)), sum(terms) / divisor)

    def test_a_piecewise_linear_loss_of_a_linear_model_has_none(self):
        assert not hessian(nn.Linear(FEATURES, CLASSES), nn.L1Loss(), regression_data()).any()


class TestAgreesWithDoubleBackward:
    @pytest.mark.default_cases("*-mean")
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("name", MODELS)
    def test_models(self, name, reduction):
        model, X, y = make(name)
        assert_agrees_with_double_backward(model, nn.MSELoss(reduction=reduction), X, y)

    # A one-element vmap inside a forward-mode derivative would treat the saved statistics as constants.
    @pytest.mark.parametrize("columns", [1, 3])
    @pytest.mark.parametrize("name", ["layer norm", "batch norm, training", "instance norm"])
    def test_normalization_is_differentiated_however_few_columns_at_a_time(self, name, columns, monkeypatch):
        monkeypatch.setattr(functorch_reference, "_columns_at_a_time", lambda f, theta: columns)
        model, X, y = make(name)
        assert_agrees_with_double_backward(model, MSE, X, y)

    @pytest.mark.parametrize(
        ("loss", "targets"),
        [
            (nn.SmoothL1Loss(beta=0.5), torch.randn_like),
            (nn.HuberLoss(delta=0.5), torch.randn_like),
            (nn.HuberLoss(reduction="sum"), torch.randn_like),
            (nn.BCEWithLogitsLoss(), lambda p: torch.rand_like(p).round()),
            (nn.KLDivLoss(reduction="batchmean"), lambda p: torch.rand_like(p).softmax(-1)),
            (nn.CrossEntropyLoss(ignore_index=1), lambda p: p.argmin(-1)),
            (nn.CrossEntropyLoss(label_smoothing=0.1), lambda p: torch.rand_like(p).softmax(-1)),
            # No forward-mode derivative: the reference uses reverse mode.
            (nn.SoftMarginLoss(), lambda p: torch.randn_like(p).sign()),
        ],
    )
    def test_losses(self, loss, targets):
        model, X, _ = make("mlp")
        assert_agrees_with_double_backward(model, loss, X, targets(model(X).detach()))

    def test_a_function_that_vmap_does_not_know(self):
        model, X, y = make("mlp")
        assert_agrees_with_double_backward(Model(lambda m, X: Sine.apply(m.inner(X)), inner=model), MSE, X, y)

    @pytest.mark.parametrize("padding_idx", [None, 1])
    def test_tied_weights_are_one_parameter(self, padding_idx):
        model = nn.Sequential(nn.Embedding(WORDS, 3, padding_idx), nn.Tanh(), nn.Linear(3, WORDS))
        model[2].weight = model[0].weight
        X, y = torch.randint(WORDS, (EXAMPLES,)), torch.randint(WORDS, (EXAMPLES,))
        assert_agrees_with_double_backward(model, nn.CrossEntropyLoss(), X, y)


def weight_norms(old=False):
    """Weight-normalized layers with several dims: the matrix contains the second derivative of the norm."""
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        parts = [norm(nn.Linear(FEATURES, 4), dim=1), nn.Tanh(), norm(nn.Linear(4, 3)), nn.Tanh()]
        # The norm of all entries has no forward-mode derivative in torch 2.13: the reference uses reverse mode.
        return nn.Sequential(*parts, norm(nn.Linear(3, CLASSES), dim=None if old else 0))


def weight_normed_convolution():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(STEPS, 3, 2), dim=2)
    return over_time(lambda m, X: m.conv(X).tanh(), 3, conv=conv)


def numerical(model, loss, X, y):
    """Differentiate the gradient by central differences, without second derivatives of torch."""
    params = list(model.parameters())
    theta, step = nn.utils.parameters_to_vector(params).detach(), 1e-5

    def gradient(at):
        nn.utils.vector_to_parameters(at, params)
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss(model(X), y), params))

    steps = step * torch.eye(len(theta))
    hessian = torch.stack([(gradient(theta + e) - gradient(theta - e)) / (2 * step) for e in steps], dim=1)
    nn.utils.vector_to_parameters(theta, params)
    return hessian


class TestAgreesWithFiniteDifferences:
    """If a second derivative of torch is wrong, double backward and the reference may be wrong in the same way."""

    @pytest.mark.parametrize(
        ("make_model", "loss"),
        [
            (weight_norms, MSE),
            (lambda: weight_norms(old=True), MSE),
            (weight_normed_convolution, MSE),
            (mlp, nn.CrossEntropyLoss()),
            (MODELS["layer norm"], MSE),
            (MODELS["multi-head"], MSE),
            (MODELS["fused attention"], MSE),
            (MODELS["batch norm, evaluation"], MSE),
        ],
        ids=[
            "weight norm",
            "old weight norm",
            "convolution",
            "mlp",
            "layer norm",
            "multi-head",
            "attention",
            "batch norm",
        ],
    )
    def test_models(self, make_model, loss):
        model, (X, y) = make_model(), regression_data()
        if isinstance(model, Model):
            X = torch.randn(EXAMPLES, STEPS, 4)
        if isinstance(loss, nn.CrossEntropyLoss):
            y = y.argmax(1)
        expected = numerical(model, loss, X, y)
        error = hessian(model, loss, *unequal_batches(X, y)) - expected
        assert error.norm() < 1e-8 * expected.norm()


class Direction(torch.autograd.Function):
    """``x / |x|``, with a backward that treats the norm as a constant, like torch's fused weight norm."""

    generate_vmap_rule = True
    forward = staticmethod(lambda x: x / x.norm())
    setup_context = staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

    @staticmethod
    def backward(ctx, along):
        (x,) = ctx.saved_tensors
        norm = x.detach().norm()
        return along / norm - x * (x * along).sum() / norm**3


class TestWrongDerivatives:
    """The reference raises if torch is wrong, but not because of rounding."""

    def test_a_matrix_that_is_not_symmetric(self):
        model, X, y = make("mlp")
        wrong = Model(lambda m, X: Direction.apply(m.inner(X)), inner=model)
        with pytest.raises(RuntimeError, match=r"not symmetric .* wrong derivative"):
            hessian(wrong, MSE, (X, y))

    @pytest.mark.parametrize("in_place", [False, True])
    def test_a_forward_mode_that_reverse_mode_contradicts(self, in_place):
        index = torch.arange(4).remainder(2).expand(EXAMPLES, 4)

        def products(m, X):
            start, hidden = torch.ones(EXAMPLES, CLASSES), m.layer(X)
            scatter = start.scatter_reduce_ if in_place else start.scatter_reduce
            return scatter(1, index, hidden, "prod")

        model = Model(products, layer=nn.Linear(FEATURES, 4))
        with pytest.raises(RuntimeError, match="forward and reverse mode disagree"):
            hessian(model, MSE, regression_data())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_a_matrix_of_rounding_errors_alone(self, dtype):
        # A softmax always sums to one.
        model, (X, y) = mlp(nn.LayerNorm(4)).to(dtype), (part.to(dtype) for part in regression_data())
        matrix = hessian(model, lambda p, y: (p.softmax(-1).sum(-1) + y[:, 0] ** 2).mean(), (X, y))
        assert matrix.abs().max() < 100 * torch.finfo(dtype).eps

    def test_single_precision_inside_a_double_model(self):
        model, (X, y) = mlp(), regression_data()
        actual = hessian(model, lambda p, y: MSE(p.float(), y.float()), (X, y))
        torch.testing.assert_close(actual, hessian(model, MSE, (X, y)), rtol=0, atol=1e-5)


class TestParams:
    @pytest.mark.parametrize("chosen", [("3.bias", "0.weight", "1.weight"), ("3.weight",), ("1.bias", "1.weight")])
    def test_a_subset_in_any_order_is_a_submatrix(self, chosen):
        model, X, y = make("layer norm")
        own, full = dict(model.named_parameters()), hessian(model, MSE, (X, y))
        places = dict(zip(own, torch.arange(len(full)).split([p.numel() for p in own.values()]), strict=True))
        index = torch.cat([places[name] for name in chosen])
        actual = functorch_hessian(model, MSE, {name: own[name] for name in chosen}, [(X, y)])
        assert_same(actual, full[index][:, index])
        for listed in ([own[name] for name in chosen], (own[name] for name in chosen)):
            assert torch.equal(functorch_hessian(model, MSE, listed, [(X, y)]), actual)

    def test_values_given_are_used_by_modules_and_callables(self):
        model, X, y = make("layer norm")
        expected = hessian(model, MSE, (X, y))
        values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        nn.init.zeros_(model[0].weight)
        for callable_or_module in (model, lambda params, X: torch.func.functional_call(model, params, X)):
            assert_same(functorch_hessian(callable_or_module, MSE, values, [(X, y)]), expected)

    def test_a_parameter_that_the_loss_never_reaches_has_zero_rows_and_columns(self):
        used, idle, batch = nn.Linear(FEATURES, CLASSES), nn.Linear(1, 1), regression_data()
        expected = torch.block_diag(hessian(used, MSE, batch), torch.zeros(2, 2))
        assert_same(hessian(Model(lambda m, X: m.used(X), used=used, idle=idle), MSE, batch), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_dtype_is_the_parameters(self, dtype):
        X, y = (part.to(dtype) for part in regression_data())
        assert hessian(mlp().to(dtype), MSE, (X, y)).dtype == dtype

    def test_params_that_are_not_the_models(self):
        for params, message in (({}, "empty"), ({"wieght": torch.ones(2)}, "'wieght'"), ([torch.ones(2)], "own")):
            with pytest.raises(ValueError, match=message):
                functorch_hessian(mlp(), MSE, params, [regression_data()])


class TestData:
    @pytest.mark.parametrize(
        ("wrap", "unwrap"),
        [
            (lambda a, b: {"a": a, "b": b}, lambda X: (X["a"], X["b"])),
            (lambda a, b: UserDict(a=a, b=b), lambda X: (X.data["a"], X.data["b"])),
            (lambda a, b: MappingProxyType({"a": a, "b": b}), lambda X: (X["a"], X["b"])),
            (lambda a, b: [a, b], lambda X: [*X]),
            (lambda a, b: (a, ({"b": [b]}, None)), lambda X: (X[0], X[1][0]["b"][0])),
            (namedtuple("Pair", ["a", "b"]), lambda X: (X.a, X.b)),
        ],
    )
    def test_batches_are_joined_leaf_by_leaf(self, wrap, unwrap):
        (X, y), (Z, z) = regression_data(), regression_data()

        def loss(prediction, y):
            return sum(MSE(p, t) for p, t in zip(prediction, unwrap(y), strict=True))

        model = Model(lambda m, X: [m.layer(part).tanh() for part in unwrap(X)], layer=nn.Linear(FEATURES, CLASSES))
        expected = double_backward(loss(model(wrap(X, Z)), wrap(y, z)), model)
        batches = [(wrap(X[cut], Z[cut]), wrap(y[cut], z[cut])) for cut in (slice(2), slice(2, EXAMPLES))]
        assert_same(hessian(model, loss, *batches), expected)

    def test_one_pass_over_an_iterator_is_enough_and_none_too_few(self):
        model, X, y = make("mlp")
        batches = iter(unequal_batches(X, y))
        assert_same(functorch_hessian(model, MSE, dict(model.named_parameters()), batches), hessian(model, MSE, (X, y)))
        with pytest.raises(ValueError, match="no batches"):
            functorch_hessian(model, MSE, dict(model.named_parameters()), batches)

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (torch.ones(2, 3), torch.ones(2, 4), r"X is of shapes \[\(2, 3\), \(2, 4\)\]"),
            ({"ids": torch.ones(2, 3)}, {"ids": torch.ones(2, 4)}, r"X\['ids'\] is"),
            ({"ids": torch.ones(2)}, {"mask": torch.ones(2)}, "different keys"),
            ([torch.ones(2)], [torch.ones(2)] * 2, r"of lengths \[1, 2\]"),
            ((None, torch.ones(2)), (torch.ones(2), torch.ones(2)), r"X\[0\] is of types"),
            (torch.tensor(1.0), torch.tensor(1.0), r"of shapes \[\(\)\]"),
            (*[nn.utils.rnn.pack_sequence([torch.ones(2)])] * 2, "packed"),
        ],
    )
    def test_batches_that_cannot_be_joined(self, first, second, message):
        with pytest.raises(ValueError, match=rf"cannot be joined.*{message}.*pad"):
            hessian(mlp(), MSE, (first, torch.ones(2)), (second, torch.ones(2)))


class TestObjective:
    def test_a_loss_that_is_not_a_scalar(self):
        with pytest.raises(ValueError, match=r"scalar.*\(7, 2\).*reduction"):
            hessian(mlp(), nn.MSELoss(reduction="none"), regression_data())

    def test_a_random_loss(self):
        model = mlp(nn.Dropout())
        with pytest.raises(RuntimeError, match=r"random.*evaluation mode"):
            hessian(model, MSE, regression_data())
        assert hessian(model.eval(), MSE, regression_data()).any()

    @pytest.mark.parametrize("name", ["batch norm, training", "batch norm, evaluation", "transformer, evaluation"])
    def test_nothing_is_left_changed(self, name):
        model, X, y = make(name)
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 2 == 0)
            parameter.grad = torch.full_like(parameter, i) if i % 3 == 0 else None

        def snapshot():
            own = list(model.parameters())
            flags = [(id(p), p.requires_grad, p.grad is None) for p in own] + [m.training for m in model.modules()]
            gradients = [p.grad for p in own if p.grad is not None]
            tensors = [X, y, torch.get_rng_state(), *model.state_dict().values(), *gradients]
            return flags, [tensor.clone() for tensor in tensors]

        flags, tensors = snapshot()
        hessian(model, MSE, *unequal_batches(X, y))
        assert snapshot()[0] == flags
        assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == BACKENDS
        assert all(map(torch.equal, snapshot()[1], tensors))


def test_rounding_errors_of_a_zero_hessian_are_no_contradiction() -> None:
    """log(exp(z)) is z, so its Hessian is zero up to rounding errors, which are not symmetric."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    data = [(torch.randn(7, 4).double(), torch.zeros(7, 1).double())]
    params = dict(model.named_parameters())
    hessian = functorch_hessian(model, lambda z, y: ((z.exp() * 3).log() - z.sin().asin()).mean(), params, data)
    assert hessian.abs().max() < 1e-13
