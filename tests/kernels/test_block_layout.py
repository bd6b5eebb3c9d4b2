"""Layouts of the parameters of a layer as a stack of matrices, against loops over entries."""

from __future__ import annotations

import pytest
import torch

from curvop.kernels.kronecker_factors import BlockLayout, FlatLayout

K = 3


def size(*shape: int) -> torch.Size:
    return torch.Size(shape)


def draw(layout: BlockLayout | FlatLayout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(K, *shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }


LINEAR = BlockLayout(("w", "b"), (size(4, 5), size(4)), 1, 4, 5, bias=True)
CONVOLUTION = BlockLayout(("w", "b"), (size(6, 4, 3, 2), size(6)), 2, 3, 24, bias=True)
TRANSPOSED = BlockLayout(("w", "b"), (size(5, 4), size(4)), 1, 4, 5, bias=True, transposed=True)
TRANSPOSED_CONVOLUTION = BlockLayout(("w",), (size(6, 2, 3),), 3, 6, 2, transposed=True)
BIAS = BlockLayout(("b",), (size(6),), 2, 3, 0, bias=True)
ROWS = BlockLayout(("w", "b"), (size(12, 5), size(12)), 1, 4, 5, bias=True, rows=(4, 8))
SCALED = BlockLayout(("w",), (size(4, 1),), 1, 4, 1)
FLAT = FlatLayout(("gain", "scale", "other"), (size(3), size(), size(2, 2)))
LAYOUTS = {
    "linear": LINEAR,
    "convolution": CONVOLUTION,
    "transposed": TRANSPOSED,
    "transposed convolution": TRANSPOSED_CONVOLUTION,
    "bias": BIAS,
    "rows": ROWS,
    "one input": SCALED,
    "flat": FLAT,
}


class TestEntries:
    def test_a_linear_layer_has_its_bias_in_the_last_column(self) -> None:
        parts = draw(LINEAR)
        V = LINEAR.gather(parts)
        assert V.shape == (K, 1, 4, 6)
        assert torch.equal(V[:, 0, :, :5], parts["w"])
        assert torch.equal(V[:, 0, :, 5], parts["b"])

    def test_a_grouped_convolution_has_one_matrix_per_group(self) -> None:
        parts = draw(CONVOLUTION)
        V = CONVOLUTION.gather(parts)
        assert V.shape == (K, 2, 3, 25)
        for group in range(2):
            for output in range(3):
                assert torch.equal(V[:, group, output, :24], parts["w"][:, 3 * group + output].reshape(K, 24))
                assert torch.equal(V[:, group, output, 24], parts["b"][:, 3 * group + output])

    def test_a_transposed_weight(self) -> None:
        parts = draw(TRANSPOSED)
        V = TRANSPOSED.gather(parts)
        assert torch.equal(V[:, 0, :, :5], parts["w"].mT)
        assert torch.equal(V[:, 0, :, 5], parts["b"])

    def test_a_transposed_convolution(self) -> None:
        parts = draw(TRANSPOSED_CONVOLUTION)
        V = TRANSPOSED_CONVOLUTION.gather(parts)
        for group in range(3):
            for index in range(2):
                assert torch.equal(V[:, group, :, index], parts["w"][:, 2 * group + index].reshape(K, 6))

    def test_a_bias_alone_is_the_only_column(self) -> None:
        parts = draw(BIAS)
        assert torch.equal(BIAS.gather(parts), parts["b"].reshape(K, 2, 3, 1))

    def test_some_rows_only(self) -> None:
        parts = draw(ROWS)
        V = ROWS.gather(parts)
        assert torch.equal(V[:, 0, :, :5], parts["w"][:, 4:8])
        assert torch.equal(V[:, 0, :, 5], parts["b"][:, 4:8])

    def test_other_parameters_are_one_column(self) -> None:
        parts = draw(FLAT)
        expected = torch.cat([part.reshape(K, -1) for part in parts.values()], dim=1)
        assert torch.equal(FLAT.gather(parts), expected.reshape(K, 1, 8, 1))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
class TestAllLayouts:
    def test_sizes(self, layout: BlockLayout | FlatLayout) -> None:
        V = layout.gather(draw(layout))
        assert V.shape[1:] == layout.dims
        assert V[0].numel() == layout.size

    def test_scatter_is_the_adjoint_and_the_inverse_of_gather(self, layout: BlockLayout | FlatLayout) -> None:
        parts = draw(layout)
        V = layout.gather(parts)
        back = layout.scatter(V)
        assert list(back) == list(layout.names)
        assert all(back[name].shape == parts[name].shape for name in back)
        assert torch.equal(layout.gather(back), V)
        W = torch.randn(V.shape, dtype=V.dtype, generator=torch.Generator().manual_seed(1))
        inner = sum((parts[name] * part).sum() for name, part in layout.scatter(W).items())
        torch.testing.assert_close(inner, (V * W).sum(), rtol=1e-12, atol=1e-12)

    def test_a_missing_parameter_counts_as_zeros(self, layout: BlockLayout | FlatLayout) -> None:
        parts = draw(layout)
        for name in layout.names:
            zeros = {other: part if other == name else torch.zeros_like(part) for other, part in parts.items()}
            assert torch.equal(layout.gather({name: parts[name]}), layout.gather(zeros))
            assert list(layout.scatter(layout.gather(parts), [name])) == [name]


def test_entries_outside_of_the_rows_are_zero() -> None:
    back = ROWS.scatter(ROWS.gather(draw(ROWS)))
    assert not back["w"][:, :4].any()
    assert not back["w"][:, 8:].any()
    assert not back["b"][:, :4].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("w",), (size(4, 5),), 1, 5, 5), "'w' has shape"),
        ((("w",), (size(4, 5),), 1, 4, 5, True), "needs 2 parameters"),
        ((("w",), (size(4, 5),), 1, 4, 5, False, False, (2, 6)), "'w' has shape"),
    ],
)
def test_sizes_that_do_not_match(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLayout(*arguments)  # type: ignore[arg-type]
