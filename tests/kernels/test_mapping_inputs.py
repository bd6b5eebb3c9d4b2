"""A mapping as X: as keywords if the model's forward takes them so, as one argument otherwise."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np
import pytest
import torch
from agreement import close
from torch import Tensor, nn
from torch.func import functional_call

from curvop import GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator, NonFiniteProductError, check
from curvop.examples.functorch import functorch_ggn
from curvop.testing.functorch_reference import call_arguments


class Layers(nn.Module):
    """Holds the layers of all models; subclasses define how X comes in."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(2, 4).double()
            self.last = nn.Linear(4, 2).double()

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(a) * self.second(b)))


class Keywords(Layers):
    def forward(self, a, b):
        return self.of(a, b)


class Optional(Layers):
    def forward(self, a=None, mask=None, b=None, scale=1.0):
        assert mask is None
        return scale * self.of(a, b)


class KeywordsOnly(Layers):
    def forward(self, *, a, b):
        return self.of(a, b)


class AnyKeywords(Layers):
    def forward(self, **parts):
        return self.of(parts["a"], parts["b"])


class SomeKeywords(Layers):
    def forward(self, a: Tensor, **parts: Tensor) -> Tensor:
        return self.of(a, parts["b"])


class Wrapped(Layers):
    @functools.wraps(Keywords.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return Keywords.forward(self, *args, **kwargs)


class OneArgument(Layers):
    def forward(self, X):
        return self.of(X["a"], X["b"])


class OneOfSeveral(Layers):
    def forward(self, X, scale=1.0, **more):
        assert not more
        return scale * self.of(X["a"], X["b"])


class Annotated(Layers):
    """The first parameter is named as a key, but is a mapping."""

    def forward(self, a: Mapping[str, Tensor], b: Tensor | None = None) -> Tensor:
        assert b is None
        return self.of(a["a"], a["b"])


class HandlesBoth(Layers):
    """Its first parameters are named as the keys, but it takes the mapping apart itself."""

    def forward(self, a, b=None):
        assert b is None
        return self.of(a["a"], a["b"])


class Passed(Layers):
    """A wrapper whose signature shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = [Keywords()]  # not a submodule, so the parameters have the same names
        for name, part in self.named_children():
            setattr(self.inner[0], name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner[0](*args, **kwargs)


class Unbound(Layers):
    """The instance is not named self."""

    def forward(this, a, b):  # noqa: N805
        return this.of(a, b)


class PositionOnly(Layers):
    def forward(self, a, /, b=None):
        assert b is None
        return self.of(a["a"], a["b"])


class Predictor(Tensor):
    """A type whose name contains the word dict."""


class OfPredictor(Layers):
    def forward(self, a: Predictor, b: Tensor) -> Tensor:
        return self.of(a, b)


class Parts(TypedDict):
    a: Tensor
    b: Tensor


class OfTypedDict(Layers):
    def forward(self, a: Parts, b: Tensor | None = None) -> Tensor:
        assert b is None
        return self.of(a["a"], a["b"])


class AnyArguments(Layers):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (X,) = args
        assert not kwargs
        return self.of(X["a"], X["b"])


AS_KEYWORDS = [Keywords, Optional, KeywordsOnly, AnyKeywords, SomeKeywords, Wrapped, Passed, Unbound, OfPredictor]
AS_ONE = [OneArgument, OneOfSeveral, Annotated, AnyArguments, HandlesBoth, PositionOnly, OfTypedDict]


def data_of(kind: Callable[[dict[str, Tensor]], Any] = dict) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    a, b, y = (torch.randn(5, n, dtype=torch.float64, generator=generator) for n in (3, 2, 2))
    return [(kind({"a": a[part], "b": b[part]}), y[part]) for part in (slice(0, 3), slice(3, 5))]


def expected(model: Layers) -> np.ndarray:
    """Return the GGN of the mean squared error from the Jacobian of the layers, called without any mapping."""
    X = {name: torch.cat([batch[0][name] for batch in data_of()]) for name in ("a", "b")}
    rows = [
        torch.cat([part.reshape(-1) for part in torch.autograd.grad(z, list(model.parameters()), retain_graph=True)])
        for z in model.of(**X).reshape(-1)
    ]
    J = torch.stack(rows)
    return (2 * J.T @ J / len(J)).numpy()


@pytest.mark.parametrize("kind", [dict, UserDict], ids=["dict", "UserDict"])
@pytest.mark.parametrize("model", AS_KEYWORDS + AS_ONE)
def test_the_model_is_called_as_its_signature_says(model: Any, kind: Any) -> None:
    made = model()
    G = GGNLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data_of(kind))
    close(G @ np.eye(38), expected(made))
    close(G.diagonal(), np.diag(expected(made)))


@pytest.mark.slow_cases(
    *("Optional", "KeywordsOnly", "AnyKeywords", "Wrapped", "OneArgument", "AnyArguments", "Unbound", "PositionOnly")
)
@pytest.mark.parametrize("model", AS_KEYWORDS + AS_ONE)
class TestOtherRoutes:
    def test_check_calls_it_the_same_way_by_code_of_its_own(self, model: Any) -> None:
        made = model()
        report = check(
            HessianLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data_of()), rng=0, progress=False
        )
        assert report.verdict.startswith("sound")

    def test_dense_references_do_too(self, model: Any) -> None:
        made = model()
        args, kwargs = call_arguments(made, data_of()[0][0])
        assert bool(kwargs) == (model in AS_KEYWORDS)
        assert torch.equal(made(*args, **kwargs), made.of(**data_of()[0][0]))
        close(functorch_ggn(made, nn.MSELoss(), dict(made.named_parameters()), data_of()), expected(made))


@pytest.mark.slow
@pytest.mark.parametrize("model", [Keywords, OneArgument])
def test_the_compiled_engine_traces_the_same_call(model: Any) -> None:
    made = model()
    G = GGNLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data_of(), engine="compiled")
    close(G @ np.eye(38), expected(made))


class TestBothWaysFit:
    """The mapping remains one argument, as the first batch shows, unless the model raises an error then."""

    def test_a_model_that_takes_both(self) -> None:
        """As keywords, the scale would be lost."""

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 1, bias=False).double()

            def forward(self, x, scale=None):
                return self.layer(x["x"] * x["scale"] if isinstance(x, dict) else x)

        model = Scaled()
        data = [({"x": torch.ones(2, 3, dtype=torch.float64), "scale": 2.0}, None)]
        J = JacobianLinearOperator(model, dict(model.named_parameters()), data)
        close(J @ np.eye(3), np.full((2, 3), 2.0))

    def test_the_attempt_leaves_no_trace(self) -> None:
        class Counting(Keywords):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

            def forward(self, a, b=None):
                self.calls += 1
                if isinstance(a, dict):
                    a.clear()
                return self.calls * self.of(a, b)

        made = Counting()
        G = GGNLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data_of())
        close(G @ np.eye(38), expected(made))
        assert float(made.calls) == 0

    def test_data_parallel(self) -> None:
        made = Keywords()
        wrapper = nn.DataParallel(made)
        G = GGNLinearOperator(wrapper, nn.MSELoss(), dict(wrapper.named_parameters()), data_of())
        close(G @ np.eye(38), expected(made))

    def test_keys_that_are_no_strings(self) -> None:
        class Numbered(Layers):
            def forward(self, X, **more):
                return self.of(X[0], X[1])

        made = Numbered()
        data = [({0: X["a"], 1: X["b"]}, y) for X, y in data_of()]
        H = GGNLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data)
        close(H @ np.eye(38), expected(made))
        assert check(H, rng=0, progress=False).verdict.startswith("sound")


class TestOneParameter:
    """Whether ``forward(self, a)`` takes ``{"a": tensor}`` as one argument cannot be seen in its signature."""

    def products(self, forward: Any) -> np.ndarray:
        model = type("Model", (nn.Module,), {"forward": forward})()
        model.layer = nn.Linear(3, 1, bias=False).double()
        data = [({"a": torch.ones(2, 3, dtype=torch.float64)}, None)]
        return JacobianLinearOperator(model, dict(model.named_parameters()), data) @ np.ones(3)

    def test_without_an_annotation_it_remains_one_argument(self) -> None:
        def forward(self, a):
            return self.layer(a["a"])

        close(self.products(forward), [3, 3])

    def test_annotated_as_a_tensor_it_is_a_keyword(self) -> None:
        def forward(self, a: Tensor) -> Tensor:
            return self.layer(a)

        close(self.products(forward), [3, 3])


class TestWhatDoesNotFit:
    def test_neither_way(self) -> None:
        model = Keywords()
        data = [({"a": torch.ones(2, 3), "c": torch.ones(2, 2)}, torch.ones(2, 2))]
        G = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
        match = (
            r"keys 'a', 'c', which fits the model's forward\(a, b\) neither as one .* model\(X\), nor .*model\(\*\*X\)"
        )
        with pytest.raises(TypeError, match=match):
            G @ np.ones(G.shape[1])

    @pytest.mark.parametrize(
        ("model", "note"), [(Optional, r"model\(\*\*X\)"), (OneArgument, r"one argument, model\(X\)")]
    )
    def test_errors_of_the_model_say_how_it_was_called(self, model: Any, note: str) -> None:
        made = model()
        data = [({"a": torch.ones(2, 3).double(), "scale": "x"}, torch.ones(2, 2))]
        G = GGNLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data)
        with pytest.raises((TypeError, KeyError, AttributeError)) as raised:
            G @ np.ones(G.shape[1])
        [found] = [line for line in raised.value.__notes__ if "X is a mapping" in line]
        assert "model(X)" in found
        assert "model(**X)" in found
        assert "functional_call(model, params, (), X)" in found or model is Optional

    def test_errors_of_any_type_have_the_note(self) -> None:
        class Failing(Keywords):
            def forward(self, a, b=None):
                raise self.error

        for error in (IndexError("a"), RuntimeError("b"), AssertionError("c")):
            made = Failing()
            made.error = error
            G = GGNLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data_of())
            with pytest.raises(type(error)) as raised:
                G @ np.ones(38)
            [found] = [line for line in raised.value.__notes__ if "X is a mapping" in line]
            assert f"As one argument, model(X), it raised {type(error).__name__}: {error}." in found

    def test_errors_of_this_package_have_no_note(self) -> None:
        class Own(Keywords):
            def forward(self, a, b=None):
                raise NonFiniteProductError("not finite")

        made = Own()
        G = GGNLinearOperator(made, nn.MSELoss(), dict(made.named_parameters()), data_of())
        with pytest.raises(NonFiniteProductError) as raised:
            G @ np.ones(38)
        assert not any("X is a mapping" in note for note in raised.value.__notes__)


def test_a_function_receives_the_mapping() -> None:
    model = Keywords()
    G = GGNLinearOperator(
        lambda params, X: functional_call(model, params, (), X),
        nn.MSELoss(),
        dict(model.named_parameters()),
        data_of(),
    )
    close(G @ np.eye(38), expected(model))
