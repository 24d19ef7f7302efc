"""Signals carried in boxes are the whole signals, whatever the geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deconvviz.boxes import Boxed, boxed
from deconvviz.capture import watch
from deconvviz.projection import _Way, back_to_inputs, project
from deconvviz.units import seeds

integers = st.integers


@st.composite
def stacks(draw: st.DrawFn, spatial: int) -> nn.Sequential:
    """Two to five random layers with windows, of 4 channels each."""
    conv, most, mean, norm = (getattr(nn, f"{name}{spatial}d") for name in ("Conv", "MaxPool", "AvgPool", "BatchNorm"))
    layers: list[nn.Module] = [conv(2, 4, draw(integers(1, 3)), padding=draw(integers(0, 2)))]
    for _ in range(draw(integers(1, 4))):
        kernel, stride = draw(integers(1, 3)), draw(integers(1, 3))
        padding = draw(integers(0, kernel // 2))
        layers += draw(
            st.sampled_from(
                [
                    lambda k=kernel, s=stride, p=padding: [conv(4, 4, k, s, p, groups=2), nn.ReLU()],
                    lambda k=kernel, s=stride: [conv(4, 4, k, 1, s, dilation=s), norm(4)],
                    lambda k=kernel, s=stride, p=padding: [most(k, s, p)],
                    lambda k=kernel, s=stride, p=padding: [most(k, s, p, ceil_mode=True)],
                    lambda k=kernel, s=stride, p=padding: [mean(k, s, p), Residual(conv(4, 4, 3, padding=1))],
                    lambda: [
                        nn.GELU(),
                        SideBySide(conv(4, 2, 3, padding=1), conv(4, 2, 1)),
                        Gate(conv(4, 4, 1)),
                    ],
                ]
            )
        )()
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class SideBySide(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    """A gate with positions, then one without (squeeze and excite)."""

    def __init__(self, filter: nn.Module) -> None:
        super().__init__()
        self.filter = filter

    def forward(self, x):
        x = x * torch.sigmoid(self.filter(x))
        return x * torch.sigmoid(x.mean(tuple(range(2, x.dim())), keepdim=True))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_boxed_signals_are_the_whole_ones(spatial, data):
    torch.manual_seed(data.draw(integers(0, 999), "seed"))
    model = data.draw(stacks(spatial), "model").double().eval()
    size = data.draw(st.lists(integers(9, 14 if spatial == 3 else 24), min_size=spatial, max_size=spatial))
    overlap = data.draw(st.sampled_from(["sum", "overwrite"]))
    images = torch.randn(2, 2, *size, dtype=torch.float64)
    try:
        with torch.no_grad():
            activation = model(images)
    except RuntimeError:
        return  # a map became smaller than a window
    tape, _ = watch(model, (images,))
    value = tape.calls[-1].outputs[0]
    cells = [data.draw(st.lists(integers(0, n - 1), min_size=2, max_size=2)) for n in activation.shape[2:]]
    for position in ("max", torch.tensor(cells).T):
        boxed = seeds(activation, torch.tensor([[0, 3, 1], [2, 2, 0]]), position, "activation")(slice(0, 3))
        assert isinstance(boxed, Boxed) and len(boxed.content) == 3
        (found,), (expected,) = (back_to_inputs(tape, value, s, overlap) for s in (boxed, boxed.whole()))
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max().clamp_min(1e-9)


def test_an_early_unit_stays_in_its_box():
    """Through filters, rectifiers, a skip and a pool: the pixels that it sees, not the image."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Residual(nn.Conv2d(8, 8, 3, padding=1))
    )
    images = torch.randn(2, 3, 64, 64)
    tape, activation = watch(model.eval(), (images,))
    make = seeds(activation, torch.tensor([[0, 5]]).expand(2, 2), torch.tensor([[9, 0], [31, 20]]), "one")
    value = tape.calls[-1].outputs[0]
    way, signals = _Way(tape, value, "sum"), {value: make(slice(0, 2))}
    bytes_held = max(way.through(step, signals) for step in way.steps)
    (signal,) = signals.values()
    assert isinstance(signal, Boxed) and signal.size == (8, 8)
    assert bytes_held < images.nbytes // 2


@pytest.mark.parametrize("position", ("max", "all"))
def test_a_budget_changes_no_projection(position):
    """Signals that part on their way, once and again, down to one at a time, give what all give together."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Residual(nn.Conv2d(8, 8, 3, padding=1)),
        nn.MaxPool2d(2), nn.Conv2d(8, 7, 3),
    )  # fmt: skip
    tape, activation = watch(model.double().eval(), (torch.randn(2, 3, 16, 16, dtype=torch.float64),))
    make = seeds(activation, torch.arange(7).expand(2, -1), position, "activation")
    value = tape.calls[-1].outputs[0]
    (expected,) = project(tape, value, make, 7, budget=2**30)
    assert expected.flatten(2).abs().amax(2).min() > 0
    for budget in (1, 3000, 9000, 30000):
        (found,) = project(tape, value, make, 7, budget=budget)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_sum_of_boxes_that_do_not_lie_alike_is_whole():
    firsts = torch.tensor([[[0, 3]], [[1, 1]]])
    a = Boxed(torch.ones(1, 2, 1, 2, 2), firsts, (6, 6))
    b = Boxed(torch.ones(1, 2, 1, 2, 2), firsts.flip(2), (6, 6))
    assert torch.equal(a + b, a.whole() + b.whole()) and torch.equal(a + b.whole(), a.whole() + b.whole())
    assert torch.equal((a + a).whole(), 2 * a.whole())


def test_single_cells_are_found():
    """What captum's selectors give: one neuron an image, or the channels of one cell; else the signal stays whole."""
    signal = torch.zeros(1, 2, 3, 4, 5)
    signal[0, 0, 1, 3, 2] = signal[0, 0, 2, 3, 2] = signal[0, 1, 0, 0, 4] = -1.0
    found = boxed(signal)
    assert isinstance(found, Boxed) and found.size == (1, 1) and torch.equal(found.whole(), signal)
    for n, y in ((0, 0), (1, 1)):
        more = signal.clone()
        more[0, n, 0, y, 0] = 1.0
        assert boxed(more) is more
    flat, nothing = signal[..., 0, 0], signal * 0
    assert boxed(flat) is flat and boxed(nothing) is nothing
