"""The running top-k against a plain sort of all activations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvviz.mining.strongest import EDGES, NOBODY, Strongest


def brute_force(activation, images, k):
    """Of each map: (value, image, position) of every image's strongest unit, by a plain Python sort."""
    ranks = []
    for c in range(activation.shape[1]):
        units = []
        for image, maps in zip(images, activation, strict=True):
            if not maps.isfinite().all():
                continue
            cells = maps[c].flatten().tolist()
            flat = cells.index(max(cells))
            units.append((max(cells), int(image), tuple(int(i) for i in np.unravel_index(flat, maps.shape[1:]))))
        ranks.append(sorted(units, key=lambda unit: (-unit[0], unit[1], unit[2]))[:k])
    return ranks


def units(state):
    """The same of a state."""
    return [
        [
            (value, image, tuple(position))
            for value, image, position in zip(values, images, positions, strict=True)
            if image != NOBODY
        ]
        for values, images, positions in zip(
            state.values.tolist(), state.images.tolist(), state.positions.tolist(), strict=True
        )
    ]


def mined(activation, images, k=9, batch=7):
    state = Strongest.empty(activation.shape[1], activation.dim() - 2, k)
    for i in range(0, len(images), batch):
        state = state.updated(activation[i : i + batch], images[i : i + batch])
    return state


def same_bits(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a.arrays().values(), b.arrays().values(), strict=True))


def activations(n, *shape, seed=0, levels=None):
    """Rectified noise; of few ``levels``, so that ties are everywhere."""
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    return noise.relu() if levels is None else (noise * levels).round().relu() / levels


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 7), (4, 2, 3, 5), (6,)], ids=str)
@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_as_a_plain_sort(shape, levels, batch):
    activation = activations(40, *shape, levels=levels)
    images = torch.arange(40)
    assert units(mined(activation, images, 9, batch)) == brute_force(activation, images, 9)


def test_planted_ties_go_to_the_lower_image_then_the_lower_position():
    activation = torch.zeros(5, 1, 3, 3)
    for image, cells in {4: [(0, 1)], 1: [(2, 2), (1, 0)], 2: [(0, 0)]}.items():
        for y, x in cells:
            activation[image, 0, y, x] = 5
    state = mined(activation, torch.arange(5), k=4, batch=2)
    assert units(state) == [[(5, 1, (1, 0)), (5, 2, (0, 0)), (5, 4, (0, 1)), (0, 0, (0, 0))]]


def test_duplicates_each_count():
    activation = activations(1, 3, 4, 4).expand(6, -1, -1, -1)
    assert [[unit[1] for unit in ranks] for ranks in units(mined(activation, torch.arange(6), 4))] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("n", [1, 3])
def test_k_larger_than_the_data(n):
    activation = activations(n, 3, 4, 4)
    state = mined(activation, torch.arange(n))
    assert units(state) == brute_force(activation, torch.arange(n), 9)
    assert (state.values[:, n:] == -math.inf).all()


def test_maps_that_never_fire():
    activation = activations(12, 3, 4, 4)
    activation[:, 1] = 0
    activation[:, 2] -= 100
    state = mined(activation, torch.arange(12), k=3)
    assert units(state)[1] == [(0, 0, (0, 0)), (0, 1, (0, 0)), (0, 2, (0, 0))]
    assert state.active.tolist()[1:] == [0, 0]
    assert units(state) == brute_force(activation, torch.arange(12), 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_left_out_and_listed(bad):
    activation = activations(20, 3, 4, 4)
    activation[4, 1, 2, 2] = bad
    activation[14:16] = bad
    state = mined(activation, torch.arange(20))
    assert state.left_out == (4, 14, 15)
    assert state.seen == 17
    assert units(state) == brute_force(activation, torch.arange(20), 9)
    everything = mined(torch.full((3, 2, 2, 2), bad), torch.arange(3))
    assert units(everything) == [[], []] and everything.left_out == (0, 1, 2)


def test_statistics():
    activation = activations(30, 4, 5, 5) * 3
    state = mined(activation, torch.arange(30))
    assert state.active.tolist() == (activation.amax((2, 3)) > 0).sum(0).tolist()
    assert np.allclose([state.mean(c) for c in range(4)], activation.double().mean((0, 2, 3)).numpy(), rtol=1e-6)
    strongest = activation.amax((2, 3)).numpy()
    edges = [-math.inf, *EDGES, math.inf]
    for c in range(4):
        counts = [
            ((strongest[:, c] >= a) & (strongest[:, c] < b)).sum() for a, b in zip(edges, edges[1:], strict=False)
        ]
        assert state.histogram[c].tolist() == counts


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.data())
def test_parts_merge_in_any_order_and_grouping_to_the_same_bits(data):
    activation = activations(30, 4, 3, 3, levels=2, seed=data.draw(st.integers(0, 5)))
    activation[data.draw(st.integers(0, 29))] = math.nan
    count = data.draw(st.integers(2, 5))
    parts = [mined(activation[r::count], torch.arange(30)[r::count], batch=4) for r in range(count)]
    order = data.draw(st.permutations(range(count)))
    middle = data.draw(st.integers(1, count - 1))

    def joined(states):
        first, *rest = states
        for state in rest:
            first = first.merged(state)
        return first

    inorder = joined(parts)
    shuffled = [parts[i] for i in order]
    assert same_bits(joined(shuffled), inorder)
    assert same_bits(joined(shuffled[:middle]).merged(joined(shuffled[middle:])), inorder)
    assert units(inorder) == brute_force(activation, torch.arange(30), 9)


def test_arrays_hold_the_whole_state():
    state = mined(activations(12, 3, 4, 4), torch.arange(12))
    assert same_bits(Strongest.from_arrays(state.arrays()), state)


def test_the_size_does_not_grow():
    def size(n):
        return sum(array.nbytes for array in mined(activations(n, 3, 4, 4), torch.arange(n)).arrays().values())

    assert size(10) == size(500)


def test_half_precision_and_channels_last_are_exact():
    activation = activations(20, 3, 4, 4).bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        state = mined(activation.contiguous(memory_format=layout), torch.arange(20))
        assert units(state) == brute_force(activation.float(), torch.arange(20), 9)
