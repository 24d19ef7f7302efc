"""Switches against PyTorch's own indices, its adjoint of pooling, and MaxUnpool's overwriting."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from dense_jacobian import assert_same, projected, random
from hypothesis import example, given
from random_windows import at_random, geometries
from torch import nn

from deconvviz.switches import Switches, Windows, unpool

torch.set_num_threads(1)


def pooled(x, kernel, stride, padding, dilation, ceil_mode=False):
    """PyTorch's pool of ``x`` (N, C, *size): its output, its indices and their windows."""
    spatial = x.dim() - 2
    pool = getattr(F, f"max_pool{spatial}d")
    output, indices = pool(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    sizes = [[n] * spatial if isinstance(n, int) else n for n in (kernel, stride, padding, dilation)]
    return output, indices, Windows.strided(x.shape[2:], output.shape[2:], *map(tuple, sizes))


# ── places inside the windows ────────────────────────────────────────────────────────────────────────────


@at_random
@given(geometries(), st.booleans())
def test_places_stand_for_the_indices_of_any_pool(geometry, ceil_mode):
    size, *numbers = geometry
    _, indices, windows = pooled(random(2, 2, *size), *numbers, ceil_mode)
    places = windows.encode(indices)
    assert torch.equal(windows.decode(places), indices)
    assert places.dtype == torch.uint8


@at_random
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
@example([(9, 1), (7, 1)])
@example([(3, 9), (5, 5)])
def test_places_stand_for_the_indices_of_any_adaptive_pool(sizes):
    size, output = zip(*sizes, strict=True)
    pool = getattr(F, f"adaptive_max_pool{len(size)}d")
    _, indices = pool(random(2, 2, *size), output, return_indices=True)
    windows = Windows.adaptive(size, output)
    assert torch.equal(windows.decode(windows.encode(indices)), indices)


@pytest.mark.parametrize(
    "size", [(2**22 - 1,), (2047, 2049), (2**20, 3), (2, 2**20 - 1), (161, 161, 161), (2100, 2100)]
)
def test_places_stand_for_the_indices_on_large_maps(size):
    _, indices, windows = pooled(random(1, 1, *size).float(), 3 if min(size) > 2 else 2, 2, 1, 1)
    assert torch.equal(windows.decode(windows.encode(indices)), indices)


@pytest.mark.parametrize("size", [(128, 128), (12, 256), (2, 256, 128), (5, 112, 112)])
def test_a_byte_is_enough_where_rows_are_a_multiple_of_it_long(size):
    _, indices, windows = pooled(random(1, 2, *size), 3 if min(size) > 2 else 2, 2, 1, 1)
    places = windows.encode(indices)
    assert places.dtype == torch.uint8 and torch.equal(windows.decode(places), indices)


@pytest.mark.parametrize(("kernel", "dtype"), [((16, 16), torch.uint8), ((257,), torch.int32)])
def test_a_place_takes_a_byte_where_the_window_allows(kernel, dtype):
    x = torch.zeros(2, 1, *kernel)
    x[0].view(-1)[-1] = 1
    _, indices, windows = pooled(x, kernel, kernel, 0, 1)
    places = windows.encode(indices)
    assert places.dtype == dtype
    assert torch.equal(windows.decode(places), indices)


# ── ties ─────────────────────────────────────────────────────────────────────────────────────────────────

POOLS = [nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, 1, 1, 2)]
POOL_NAMES = ["3/2", "3/2 padded", "dilated"]


def recorded(layer, x):
    """The switches that a pass through ``layer`` leaves on its tape."""
    (step,) = projected(layer, x).tape.steps
    return step.kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
@pytest.mark.parametrize("layer", POOLS, ids=POOL_NAMES)
def test_of_equal_values_the_first_in_row_major_order_is_chosen(layer, value, dtype):
    switches = recorded(layer, torch.full((1, 1, 8, 9), value, dtype=dtype))

    def first_inside(output, size):
        starts = range(-layer.padding, output * layer.stride - layer.padding, layer.stride)
        return [next(i for i in range(start, size, layer.dilation) if i >= 0) for start in starts]

    chosen = switches.windows.decode(switches.places)[0, 0]
    rows, columns = (first_inside(o, n) for o, n in zip(chosen.shape, (8, 9), strict=True))
    assert chosen.tolist() == [[9 * row + column for column in columns] for row in rows]


@pytest.mark.parametrize("layer", POOLS, ids=POOL_NAMES)
def test_switches_of_zero_windows_are_the_same_in_every_run(layer):
    """Most windows past a ReLU hold only zeros; -0 and 0 are equal."""
    x = random(2, 3, 20, 21).sub(1.5).relu()
    negative = torch.where((x == 0) & (random(*x.shape, seed=1) > 0), -0.0, x)
    first = recorded(layer, x)
    for again in (x, negative, torch.cat([x, x])[2:], x.to(memory_format=torch.channels_last)):
        assert torch.equal(recorded(layer, again).places, first.places)


# ── unpooling ────────────────────────────────────────────────────────────────────────────────────────────


@at_random
@given(geometries(), st.booleans())
def test_sum_is_the_adjoint_of_pooling(geometry, ceil_mode):
    size, *numbers = geometry
    x = random(2, 2, *size).requires_grad_()
    output, indices, windows = pooled(x, *numbers, ceil_mode)
    signal = random(3, *output.shape, seed=1)
    expected = [torch.autograd.grad(output, x, each, retain_graph=True)[0] for each in signal]
    assert_same([Switches.record(indices, windows).unpool(signal)], [torch.stack(expected)], 1e-14)


@at_random
@given(geometries(), st.booleans())
def test_overwriting_leaves_the_last_window_in_row_major_order(geometry, ceil_mode):
    size, *numbers = geometry
    output, indices, windows = pooled(random(1, 2, *size), *numbers, ceil_mode)
    signal = random(2, *output.shape, seed=1)
    expected = torch.zeros(2, 2, math.prod(size), dtype=torch.float64)
    for m, c in ((m, c) for m in range(2) for c in range(2)):
        for cell, place in enumerate(indices[0, c].flatten().tolist()):
            expected[m, c, place] = signal[m, 0, c].flatten()[cell]
    unpooled = Switches.record(indices, windows).unpool(signal, "overwrite")
    assert torch.equal(unpooled, expected.view(2, 1, 2, *size))


def test_overwriting_is_what_max_unpool_does_on_one_thread():
    output, indices, windows = pooled(random(1, 3, 13, 12), 3, 2, 0, 1)
    signal = random(1, *output.shape, seed=1)
    expected = F.max_unpool2d(signal[0], indices, 3, 2, output_size=(13, 12))
    assert torch.equal(Switches.record(indices, windows).unpool(signal, "overwrite")[0], expected)


@pytest.mark.parametrize("overlap", ["sum", "overwrite"])
@pytest.mark.parametrize(
    ("size", "kernel", "padding", "dilation"),
    [
        ((2,), 2, 1, 3),
        ((3, 5), 2, 1, 4),
        ((1, 2), (2, 1), (1, 0), (2, 1)),
        ((1, 2, 1), (2, 1, 1), (1, 0, 0), 2),
    ],
)
def test_a_window_wholly_in_the_padding_sends_nothing_back(size, kernel, padding, dilation, overlap):
    """PyTorch gives it an index outside of the map, or of a place outside of the window."""
    pool = getattr(nn, f"MaxPool{len(size)}d")(kernel, 1, padding, dilation)
    tape, _, (back,) = projected(pool, random(2, 3, *size), overlap=overlap)
    assert tape.replay(tape.steps[0].outputs[0]).isneginf().all()
    assert torch.equal(back, torch.zeros_like(back))


@pytest.mark.parametrize("overlap", ["sum", "overwrite"])
def test_where_windows_do_not_overlap_both_ways_put_each_signal_back_once(overlap):
    output, indices, _ = pooled(random(2, 3, 8, 8), 2, 2, 0, 1)
    signal = random(4, *output.shape, seed=1)
    unpooled = unpool(signal, indices.flatten(2), (8, 8), overlap)
    assert torch.equal(unpooled.flatten(3).gather(3, indices.flatten(2).expand(4, -1, -1, -1)), signal.flatten(3))
    assert_same([unpooled.sum()], [signal.sum()])


def test_where_windows_overlap_overwriting_loses_a_third_of_the_mass_and_summing_none():
    layer, x = nn.MaxPool2d(3, 2), random(2, 8, 55, 55)
    _, signal, (summed,) = projected(nn.Sequential(layer, nn.ReLU()), x)
    _, _, (overwritten,) = projected(nn.Sequential(layer, nn.ReLU()), x, overlap="overwrite")
    mass = signal.relu().sum()
    assert_same([summed.sum()], [mass])
    assert 0.6 < overwritten.sum() / mass < 0.7
