"""Products by oneDNN against products in float64, and what they must leave to torch."""

from __future__ import annotations

import pytest
import torch

from mspgt_lens.products import _FASTER, _is_faster, _without_gaps, faster_layers, product

needs_onednn = pytest.mark.skipif(_FASTER is None, reason="torch was built without oneDNN")


def _drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(150, 200, 250), (2, 3, 4), (0, 200, 250), (150, 0, 250)])
def test_a_product_is_that_of_its_factors_however_they_lie_in_memory(shape, dtype):
    a, b, c = shape
    lying = _drawn(a, b, dtype=dtype), _drawn(b, c, dtype=dtype)
    across = _drawn(b, a, dtype=dtype).T, _drawn(c, b, dtype=dtype).T
    apart = _drawn(a, 2 * b, dtype=dtype)[:, ::2], _drawn(b, 2 * c, dtype=dtype)[:, c:]
    bias = _drawn(c, dtype=dtype)
    for left, right in (lying, across, apart):
        expected = left.double() @ right.double()
        found = product(left, right)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * max(b, 1))
        with_bias = product(left, right, bias).double()
        torch.testing.assert_close(with_bias, expected + bias, rtol=0, atol=tolerance * max(b, 1))


@needs_onednn
def test_only_large_products_of_plain_float32_on_the_cpu_are_made_otherwise():
    rows, weight = _drawn(150, 200), _drawn(250, 200)
    assert _is_faster(rows, weight)
    assert not _is_faster(rows[:2], weight)
    assert not _is_faster(rows.double(), weight.double())
    assert not _is_faster(rows.to("meta"), weight.to("meta"))
    assert not _is_faster(rows, weight.clone().requires_grad_())
    with torch.no_grad():
        assert _is_faster(rows, weight.clone().requires_grad_())
    assert not _is_faster(rows, weight.as_subclass(type("Packed", (torch.Tensor,), {})))


def test_factors_with_gaps_are_brought_together_and_others_are_not_copied():
    whole = _drawn(6, 8)
    for kept in (whole, whole.T, whole[2:], whole.T[:, 2:]):
        assert _without_gaps(kept).data_ptr() == kept.data_ptr()
    for apart in (whole[:, 2:], whole[:, 2:].T, whole.view(2, 3, 8).mT):
        found = _without_gaps(apart)
        assert found.is_contiguous()
        assert torch.equal(found, apart)


@needs_onednn
def test_linear_layers_are_the_same_to_rounding_and_keep_their_gradients():
    layers = torch.nn.Sequential(torch.nn.Linear(200, 250), torch.nn.Linear(250, 200, bias=False))
    rows = _drawn(4, 150, 200)
    expected = layers(rows)
    with faster_layers():
        with_gradients = layers(rows)
        with torch.no_grad():
            found = layers(rows)
        with torch.inference_mode():
            torch.testing.assert_close(layers(rows), found, rtol=0, atol=0)
    torch.testing.assert_close(with_gradients, expected, rtol=0, atol=0)
    with_gradients.sum().backward()
    assert layers[0].weight.grad is not None
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
    # Otherwise nothing was made otherwise.
    assert not torch.equal(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(layers(rows), expected.detach(), rtol=0, atol=0)
