"""Filters and products made ready once give what PyTorch's give, with and without packed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_windows import at_random

from deconvviz.incremental import kernels, winograd
from deconvviz.incremental.kernels import filtering, product
from deconvviz.incremental.winograd import Winograd


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@at_random
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([(3, 3), (1, 3), (3, 1), (5, 5), (1, 5), (5, 3)]),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 200_000, 10**9]),
)
def test_winograd(channels_and_batch, taps, size, padding, biased, channels_last, cached):
    """Extents that tiles of four, of three and neither fill, with padding, in one part or many."""
    batch, inward, outward = channels_and_batch
    boxes = numbers(batch, inward, *(n + t - 1 for n, t in zip(size, taps, strict=True)))
    if channels_last:
        boxes = boxes.contiguous(memory_format=torch.channels_last)
    weight, bias = numbers(outward, inward, *taps, seed=1), numbers(outward, seed=2) if biased else None
    before = boxes.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "FEW", 0)
        patch.setattr(winograd, "MOVED", -1000)
        patch.setattr(winograd, "CACHED", cached)
        found = Winograd(weight, bias, None)(boxes, padding)
    torch.testing.assert_close(found, F.conv2d(boxes, weight, bias, padding=padding), rtol=1e-12, atol=1e-12)
    assert torch.equal(boxes, before)


@pytest.mark.parametrize(
    ("batch", "channels", "size", "pays"),
    [
        (32, (256, 128), 8, True),
        (32, (64, 256), 11, True),
        (32, (64, 64), 8, False),  # bringing the channels to the points costs more than it saves
        (32, (512, 512), 1, False),  # 25 products instead of nine
        (2, (256, 128), 8, False),  # reading four times as many weights does
    ],
)
def test_winograd_where_it_pays(batch, channels, size, pays):
    """Few channels, small boxes and small batches go to the direct sum, padding and all."""
    inward, outward = channels
    boxes, weight = numbers(batch, inward, size, size), numbers(outward, inward, 3, 3, seed=1)
    directly = []

    def direct(images, padding):
        directly.append(padding)
        return F.conv2d(images, weight, None, padding=padding)

    found = Winograd(weight, None, direct)(boxes, (1, 1))
    assert directly == ([] if pays else [(1, 1)])
    torch.testing.assert_close(found, F.conv2d(boxes, weight, padding=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    ("channels", "taps", "stride", "dilation", "groups", "tiles"),
    [
        ((3, 8), (7, 7), 2, 1, 1, False),
        ((8, 8), (3, 3), 1, 2, 4, False),
        ((256, 128), (3, 3), 1, 1, 1, True),
        ((64, 192), (5, 5), 1, 1, 1, True),
        ((384, 64), (1, 3), 1, 1, 1, True),
        ((64, 64), (1, 7), 1, 1, 1, False),
        ((128, 256), (1, 1), 2, 1, 1, False),
    ],
)
def test_single_precision(monkeypatch, packs, channels, taps, stride, dilation, groups, tiles):
    """About as near to the exact sum as ``conv2d``, five taps less so; and the weights stay as they were."""
    monkeypatch.setattr(kernels, "_packing_works", lambda: packs)
    monkeypatch.setattr(winograd, "FEW", 0)
    monkeypatch.setattr(winograd, "MOVED", -1000)
    inward, outward = channels
    boxes = numbers(5, inward, 19, 17, dtype=torch.float32)
    weight = numbers(outward, inward // groups, *taps, dtype=torch.float32, seed=1)
    bias, kept = numbers(outward, dtype=torch.float32, seed=2), weight.clone()
    geometry = ((stride,) * 2, (dilation,) * 2, groups)
    kernel = filtering(weight, bias, *geometry)
    assert isinstance(kernel, Winograd) == tiles
    exact = F.conv2d(boxes.double(), weight.double(), bias.double(), geometry[0], 0, *geometry[1:])
    most = 1.5e-5 if 5 in taps else 5e-6
    assert (kernel(boxes).double() - exact).abs().max() <= most * exact.abs().max()
    assert torch.equal(weight, kept) and weight.is_contiguous()
    rows, matrix = numbers(7, 30, dtype=torch.float32), numbers(11, 30, dtype=torch.float32, seed=3)
    for b in (None, bias[:1].expand(11).contiguous()):
        torch.testing.assert_close(product(matrix, b)(rows), F.linear(rows, matrix, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precise", [True, False])
def test_products_in_half_precision(monkeypatch, precise):
    """Where a processor multiplies matrices coarsely if asked to, filters stay as exact as the model's own."""
    boxes = numbers(32, 64, 14, 14, dtype=torch.float32)
    weight = numbers(256, 64, 3, 3, dtype=torch.float32, seed=1)
    exact = F.conv2d(boxes.double(), weight.double())
    if not precise:
        monkeypatch.setattr(kernels, "_products_are_precise", lambda dtype: False)
    torch.set_float32_matmul_precision("medium")
    try:
        kernel = filtering(weight, None, (1, 1), (1, 1), 1)
        found = kernel(boxes)
        coarse = (
            boxes[0, :, 0].T @ weight[:64, :, 0, 0] - boxes[0, :, 0].T.double() @ weight[:64, :, 0, 0].double()
        ).abs()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert isinstance(kernel, Winograd) == (precise and coarse.max() < 1e-3)
    assert (found.double() - exact).abs().max() <= 5e-6 * exact.abs().max()


def test_products_are_tried_before_they_are_relied_on(monkeypatch):
    """Also where the processor has no coarse products: here they are rounded as bfloat16 rounds."""
    assert kernels._products_are_precise(torch.float32) and kernels._products_are_precise(torch.float64)
    assert not kernels._products_are_precise(torch.bfloat16)
    multiply = torch.Tensor.__matmul__

    def coarse(left, right):
        operands = (t.bfloat16().float() if t.dtype == torch.float32 else t for t in (left, right))
        return multiply(*operands)

    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    assert not kernels._products_are_precise(torch.float32)
    assert kernels._products_are_precise(torch.float64)


def test_packing_is_tried_before_it_is_used():
    """Whatever the build, the answer says whether the operations give what the public ones give."""
    kernels._packing_works.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not kernels._packing_works()
    kernels._packing_works.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda rows, weight: rows @ weight.T + 1)
        assert not kernels._packing_works()
    kernels._packing_works.cache_clear()
