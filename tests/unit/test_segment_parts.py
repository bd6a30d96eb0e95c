"""Resampling of the AuxNet: the CPU's own way gives the bits that PyTorch's operations give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsaux.models import segment_parts

SIZES = [((4, 6, 8, 12), (4, 6)), ((2, 3, 2, 2), (1, 1)), ((2, 3, 10, 6), (5, 3))]


def with_gradient(function: object, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x, size)  # type: ignore[operator]
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("large", "small"), SIZES)
def test_halving_is_average_pooling(large: tuple[int, ...], small: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(large, dtype=dtype)
    assert segment_parts.pool_to(x.requires_grad_(), small).grad_fn.name() == "_HalveBackward"  # type: ignore[union-attr]
    for found, expected in zip(
        with_gradient(segment_parts.pool_to, x, small),
        with_gradient(lambda x, _: F.avg_pool2d(x, 2), x, small),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("large", "small"), SIZES)
def test_doubling_repeats_the_nearest_entry(large: tuple[int, ...], small: tuple[int, int], dtype: torch.dtype) -> None:
    x, size = torch.randn(*large[:2], *small, dtype=dtype), (large[2], large[3])
    assert segment_parts.upsample_to(x.requires_grad_(), size).grad_fn.name() == "_DoubleBackward"  # type: ignore[union-attr]
    for found, expected in zip(
        with_gradient(segment_parts.upsample_to, x, size),
        with_gradient(lambda x, size: F.interpolate(x, size=size, mode="nearest"), x, size),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(2, 4, 8, 8).bfloat16(),
        torch.empty(2, 4, 8, 8, device="meta"),
    ],
    ids=["channels_last", "bf16", "meta"],
)
def test_other_layouts_precisions_and_devices_keep_pytorchs_operations(x: Tensor) -> None:
    names = {
        segment_parts.pool_to(x.requires_grad_(), (4, 4)).grad_fn.name(),  # type: ignore[union-attr]
        segment_parts.upsample_to(x, (16, 16)).grad_fn.name(),  # type: ignore[union-attr]
    }
    assert names == {"AvgPool2DBackward0", "UpsampleNearest2DBackward0"}


def test_a_value_that_is_no_number_stays_where_it_is() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    assert segment_parts.pool_to(x, (2, 2)).isnan().sum() == 1
    assert segment_parts.upsample_to(x, (8, 8)).isnan().sum() == 4
