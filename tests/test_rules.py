"""Every row of the table against a definition of its own: dense Jacobians in float64, and formulas by hand.

A case's key starts with the operation that it puts on the tape; the rest says which variant it is.
"""

import math
import re

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from dense_jacobian import Applied, assert_same, by_autograd, by_columns, projected, random
from hypothesis import given
from random_windows import at_random, geometries
from torch import nn
from torchvision.ops import SqueezeExcitation

from deconvviz import Deconvnet
from deconvviz.capture import watch
from deconvviz.check import CheckReport
from deconvviz.errors import UnsupportedOperation
from deconvviz.rules import EXACT, GATE, GENERALISED, GRADIENT, RULES, UNSUPPORTED

torch.set_num_threads(1)

X = random(2, 4, 4, 3)
"""The input of most cases: (N, C, H, W)."""
OTHER = random(2, 4, 4, 3, seed=2)
MASK = random(4, 3, seed=3) > 0
ORDER = torch.tensor([2, 0, 2])
PLACES = torch.tensor([0, 3, 5, 10])
"""Where four values go in a 4 x 3 map."""
GRID = random(2, 3, 2, 2, seed=4).tanh()
FILTERS = {n: random(6, 2, *[2] * n, seed=5) for n in (1, 2, 3)}
"""Six filters on two channels: two groups of the four."""
MATRIX = random(3, 5, seed=6)


def name(key):
    """The operation that a case's key starts with."""
    return re.match(r"\w+", key)[0]


def parametrised(cases):
    """One test for each case: its operation, and what the case holds."""
    return pytest.mark.parametrize(
        "operation, case", [pytest.param(name(key), case, id=key) for key, case in cases.items()]
    )


def kinds(tape, operation):
    """What ``check`` says about an operation that the tape holds; nothing where it is simply linear."""
    assert operation in {step.operation for step in tape.steps}
    return {row.kind for row in CheckReport.of(tape).operations if row.operation == operation}


def written(x, write):
    """A copy of ``x`` after ``write`` changed it in place."""
    x = x.clone()
    write(x)
    return x


# ── linear operations: the adjoint ───────────────────────────────────────────────────────────────────────

LINEAR = {
    "add": lambda x: x + OTHER + 3,
    "add in place, scaled": lambda x: x.clone().add_(x.flip(1), alpha=3),
    "add broadcast": lambda x: x + x.sum((0, 2), keepdim=True),
    "add into out": lambda x: torch.add(x, x.flip(0), out=torch.empty_like(OTHER)),
    "addcmul": lambda x: torch.addcmul(x.flip(0), x, OTHER, value=2),
    "addcmul of constants": lambda x: x.clone().addcmul_(OTHER, OTHER.flip(1)),
    "addmm": lambda x: torch.addmm(x[0, 0, :, :1], x[1, 1], mat2=MATRIX, beta=3),
    "baddbmm": lambda x: torch.baddbmm(x[:, 0, :, :1], OTHER[:, 1], x[:, 2].mT, alpha=2),
    "sub": lambda x: x - 2 * x.flip(1),
    "subtract": lambda x: torch.subtract(x, x.flip(0), alpha=2),
    "rsub": lambda x: 1 - x,
    "neg": lambda x: -x,
    "neg in place": lambda x: x.clone().neg_(),
    "negative": torch.negative,
    "positive": lambda x: +x,
    "cat": lambda x: torch.cat([x, OTHER, 2 * x], 1),
    "cat of a tuple's subclass": lambda x: torch.cat(torch.return_types.max((x, 2 * x))),
    "cat into out": lambda x: torch.cat((x, OTHER), out=random(4, 4, 4, 3)),
    "concat": lambda x: torch.concat((x, 2 * x)),
    "concatenate": lambda x: torch.concatenate((x, 2 * x), dim=-1),
    "stack": lambda x: torch.stack([x, 2 * x, OTHER], 2),
    "hstack": lambda x: torch.hstack([x, 2 * x]),
    "vstack": lambda x: torch.vstack([x, 2 * x]),
    "dstack": lambda x: torch.dstack([x, 2 * x]),
    "view": lambda x: x.view(2, -1),
    "view_as": lambda x: x.view_as(x.flatten(0, 1)),
    "reshape": lambda x: x.transpose(1, 2).reshape(8, 12),
    "reshape_as": lambda x: x.reshape_as(torch.empty(8, 12)),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "ravel": torch.ravel,
    "transpose": lambda x: x.transpose(1, 3),
    "swapaxes": lambda x: x.swapaxes(1, 3),
    "swapdims": lambda x: x.swapdims(1, 3),
    "t": lambda x: x[0, 0].t(),
    "T": lambda x: x[0, 0].T,
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "movedim": lambda x: x.movedim(1, -1),
    "moveaxis": lambda x: x.moveaxis(1, -1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "contiguous": lambda x: x.mT.contiguous(),
    "clone": torch.clone,
    "getitem": lambda x: x[:, 1:, None, ::2, -1],
    "getitem indexed, repeatedly": lambda x: x[:, ORDER],
    "getitem masked": lambda x: x[..., MASK],
    "setitem": lambda x: written(x, lambda y: y.__setitem__((0, slice(2)), x[1, 2:])),
    "setitem into a constant": lambda x: written(OTHER, lambda y: y.__setitem__((slice(None), 1), x[:, 2])),
    "setitem of a constant": lambda x: written(x, lambda y: y.__setitem__((..., MASK), 7.0)),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "select": lambda x: x.select(1, -1),
    "index_select": lambda x: x.index_select(1, ORDER),
    "gather": lambda x: x.gather(3, ORDER.expand(2, 4, 4, 3)),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: x.split(3, 1)[1] + x.split(3, 1)[0][:, :1],
    "split_with_sizes": lambda x: x.split_with_sizes([1, 3], 1)[1],
    "tensor_split": lambda x: x.tensor_split(3, 1)[0],
    "unbind": lambda x: x.unbind(1)[3] - x.unbind(1)[0],
    "unbind by iterating": lambda x: sum(i * part for i, part in enumerate(x)),
    "expand": lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1),
    "expand_as": lambda x: x[:1].expand_as(x),
    "broadcast_to": lambda x: x[:1].broadcast_to(5, 4, 4, 3),
    "repeat": lambda x: x.repeat(2, 1, 3, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "tile": lambda x: x.tile(2, 1),
    "flip": lambda x: x.flip(1, 3),
    "fliplr": torch.fliplr,
    "flipud": torch.flipud,
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "pad": lambda x: F.pad(x, (1, 2, -1, 1), value=3),
    "pad reflected": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "pad replicated": lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"),
    "sum": lambda x: x.sum((1, 3)),
    "sum of all": lambda x: x.sum(),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "cumsum": lambda x: x.cumsum(2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate bilinear": lambda x: F.interpolate(x, (7, 2), mode="bilinear"),
    "interpolate bicubic": lambda x: F.interpolate(x, (7, 5), mode="bicubic", align_corners=True),
    "interpolate antialiased": lambda x: F.interpolate(x, (2, 2), mode="bilinear", antialias=True),
    "interpolate area": lambda x: F.interpolate(x, (3, 2), mode="area"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :2], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 2, padding=1),
    "unfold windows": lambda x: x.unfold(2, 2, 1),
    "fold": lambda x: F.fold(x.reshape(2, 4, 12), (5, 4), 2),
    "masked_fill": lambda x: x.masked_fill(MASK, 7),
    "masked_fill in place": lambda x: x.clone().masked_fill_(MASK, 7),
    "where": lambda x: torch.where(MASK, x, OTHER) + torch.where(MASK, 1.0, 2 * x),
    "tril": torch.tril,
    "triu": torch.triu,
    "diagonal": lambda x: x.diagonal(1, 1, 2),
    "copy": lambda x: OTHER.clone().copy_(x),
    "copy broadcast": lambda x: OTHER.clone().copy_(x[:1]),
    "zero": lambda x: x + x.clone().zero_(),
    "fill": lambda x: x + x.clone().fill_(2),
    "fill with a value": lambda x: OTHER.clone().fill_(x[0, 0, 0, 0]),
    "index_add": lambda x: OTHER.index_add(1, ORDER, x[:, :3], alpha=2),
    "index_copy": lambda x: x.index_copy(1, ORDER[:2], x[:, 2:]),
    "overwrite": lambda x: written(x, lambda y: y.view(-1)[3:40].mul_(2)),
    "max_unpool1d": lambda x: F.max_unpool1d(x[0, :, :, 0], torch.tensor([0, 3, 5, 6]).expand(4, 4), 2),
    "max_unpool2d": lambda x: F.max_unpool2d(
        x[..., :2, :2], PLACES.view(2, 2).expand(2, 4, 2, 2), 2, output_size=(4, 3)
    ),
    "max_unpool3d": lambda x: F.max_unpool3d(
        x[:, :, None], torch.arange(12).view(1, 4, 3).expand(2, 4, 1, 4, 3) * 8, 2
    ),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2, 1, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d ceil, inside only": lambda x: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2, divisor_override=3),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[0], 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_avg_pool2d of all": nn.AdaptiveAvgPool2d(1),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, (3, 3, 2)),
    "matmul": lambda x: x @ MATRIX,
    "matmul of a constant": lambda x: MATRIX.T @ x.mT,
    "mm": lambda x: x[0, 0].mm(MATRIX),
    "bmm": lambda x: x[0].bmm(MATRIX.expand(4, 3, 5)),
    "mv": lambda x: x[0, 0].mv(MATRIX[:, 0]),
    "dot": lambda x: x[0, 0, 0].dot(MATRIX[:, 0]),
    "einsum": lambda x: torch.einsum("nchw,wk->nkc", x, MATRIX),
    "tensordot": lambda x: torch.tensordot(x, MATRIX, 1),
    "bilinear": lambda x: F.bilinear(x, random(2, 4, 4, 2), random(5, 3, 2), random(5)),
    "grid_sample": lambda x: F.grid_sample(x, GRID, align_corners=False),
    "div": lambda x: x / OTHER,
    "div in place": lambda x: x.clone().div_(4),
    "divide": lambda x: torch.divide(x, OTHER),
    "true_divide": lambda x: x.true_divide(OTHER),
    "mul": lambda x: 3 * x * OTHER,
    "mul in place": lambda x: x.clone().mul_(OTHER),
    "conv1d": lambda x: F.conv1d(x[0], FILTERS[1], random(6), 2, 1, 1, 2),
    "conv2d": lambda x: F.conv2d(x, FILTERS[2], random(6), (2, 1), (1, 0), (1, 2), 2),
    "conv2d same": lambda x: F.conv2d(x, FILTERS[2], None, 1, "same", 1, 2),
    "conv2d valid": lambda x: F.conv2d(x, FILTERS[2], padding="valid", groups=2),
    "conv2d unbatched": lambda x: F.conv2d(x[0], FILTERS[2], groups=2),
    "conv2d reflected": nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect", dtype=torch.float64),
    "conv2d circular": nn.Conv2d(4, 2, 3, padding=(1, 2), padding_mode="circular", dtype=torch.float64),
    "conv2d by its filters": lambda x: F.conv2d(random(1, 4, 5, 5), x, padding=1),
    "conv3d": lambda x: F.conv3d(x.view(1, 4, 2, 4, 3), FILTERS[3], None, 1, (1, 0, 0), groups=2),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x[0], random(4, 3, 2), random(6), 2, 1, 1, 2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, random(4, 3, 3, 2), random(6), 3, 1, (2, 1), 2, 2),
    "conv_transpose3d": lambda x: F.conv_transpose3d(x.view(1, 4, 2, 4, 3), random(4, 1, 2, 2, 2), stride=2),
    "linear": lambda x: F.linear(x, MATRIX.T, random(5)),
    "linear to one number": lambda x: F.linear(x, MATRIX[:, 0]),
    "linear by its matrix": lambda x: F.linear(random(7, 3), x[0, 0]),
    "linear by its bias": lambda x: F.linear(random(7, 3), MATRIX.T, x[0, 0].flatten()[:5]),
    "to": lambda x: x.to(torch.float32),
    "type": lambda x: x.type(torch.float32),
    "float": lambda x: x.float(),
    "double": lambda x: x.float().double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to as another": lambda x: x.float().to(x) + OTHER.float().to(x).mul(x),
    "cpu": lambda x: (2 * x).cpu(),
    "type_as": lambda x: x.float().type_as(x) * OTHER.type_as(x),
    "dropout not training": lambda x: F.dropout(x, training=False),
    "dropout in place, not training": lambda x: F.dropout(x.clone(), 0.5, False, True),
    "alpha_dropout not training": lambda x: F.alpha_dropout(x, 0.5),
}


@parametrised(LINEAR)
def test_linear_operations_go_back_by_the_adjoint(operation, case):
    tape, signal, back = projected(case, X)
    assert_same(back, by_columns(case, [X], signal))
    assert kinds(tape, operation) == ({EXACT} if "avg_pool" in operation else set())


def test_two_inputs_get_a_signal_each():
    def function(x, y):
        return torch.cat([x - y, y.mT.reshape_as(x)], 1) + y[:1, :1]

    _, signal, back = projected(function, X, OTHER)
    assert_same(back, by_columns(function, [X, OTHER], signal))


# ── rectifiers: rectify the signal ───────────────────────────────────────────────────────────────────────

RECTIFIERS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x.clone(), inplace=True),
    "relu method": lambda x: x.relu(),
    "relu method in place": lambda x: torch.relu_(x.clone()),
    "relu module": nn.ReLU(),
    "relu module in place": lambda x: nn.ReLU(inplace=True)(x.clone()),
    "clamp": lambda x: torch.clamp(x, min=0),
    "clamp in place": lambda x: x.clone().clamp_(0.0),
    "clamp to infinity": lambda x: x.clamp(0, math.inf),
    "clip": lambda x: torch.clip(x, 0),
    "clamp_min": lambda x: x.clone().clamp_min_(0),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "threshold in place": lambda x: nn.Threshold(0, 0, inplace=True)(x.clone()),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "maximum, zero first": lambda x: torch.maximum(torch.zeros_like(x), x),
    "max": lambda x: torch.max(x, torch.tensor(0.0)),
    "fmax": lambda x: torch.fmax(x, torch.tensor(0.0)),
}

GENERALISED_RECTIFIERS = {
    "relu6": F.relu6,
    "hardtanh as relu6 in place": lambda x: nn.ReLU6(inplace=True)(x.clone()),
    "hardtanh": lambda x: F.hardtanh(x, 0, 6),
    "hardtanh in place": lambda x: F.hardtanh_(x.clone(), 0.0, 1.0),
    "clamp to six": lambda x: x.clamp(0, 6),
    "clamp to six by keyword": lambda x: torch.clamp(max=6, min=0, input=x),
    "clip to one": lambda x: x.clip(0, 1),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu in place": lambda x: F.leaky_relu_(x.clone()),
    "prelu": nn.PReLU(4, dtype=torch.float64),
    "rrelu": F.rrelu,
    "rrelu training": lambda x: F.rrelu(x, training=True),
    "elu": nn.ELU(),
    "elu in place": lambda x: F.elu_(x.clone()),
    "selu": nn.SELU(),
    "celu": nn.CELU(),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "silu in place": lambda x: nn.SiLU(inplace=True)(x.clone()),
    "hardswish": nn.Hardswish(),
    "hardswish in place": lambda x: nn.Hardswish(inplace=True)(x.clone()),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "pow of relu": lambda x: F.relu(x) ** 2,
    "float_power of relu6 in place": lambda x: F.relu6(x).float_power_(3),
    "square of relu": lambda x: x.clone().relu_().square(),
    "mul: a silu by hand": lambda x: x * x.sigmoid(),
    "mul: a silu by hand, in place": lambda x: x.clone().mul_(x.sigmoid()),
    "mul: a silu by hand of another layout": lambda x: x * x.clone(memory_format=torch.channels_last).sigmoid(),
    "mul: a silu by hand, the gate first": lambda x: torch.sigmoid(x) * x,
    "mul: a quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mul: a swish with a slope for each channel": lambda x: x * torch.sigmoid(SLOPES * x),
    "mul: a mish by hand": lambda x: x * torch.tanh(F.softplus(x)),
    "mul: a hard sigmoid": lambda x: x * F.hardsigmoid(x),
}
SLOPES = torch.linspace(0.5, 2, 4, dtype=torch.float64).view(1, 4, 1, 1)


@parametrised(RECTIFIERS | GENERALISED_RECTIFIERS)
def test_rectifiers_rectify_the_signal_whatever_the_activation(operation, case):
    tape, signal, (back,) = projected(case, X)
    assert torch.equal(back, signal.where(signal > 0, 0.0))
    assert kinds(tape, operation) == {EXACT if case in RECTIFIERS.values() else GENERALISED}


@pytest.mark.parametrize(
    ("by_hand", "layer"),
    [
        (lambda x: x * F.relu6(x + 3) / 6, nn.Hardswish()),
        (lambda x: x * (F.hardtanh(x + 3, 0, 6) / 6), nn.Hardswish()),
        (lambda x: x / 6 * (x + 3).clamp(0, 6), nn.Hardswish()),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)), nn.GELU()),
        (lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x.pow(3)))), nn.GELU("tanh")),
        (lambda x: x * (-1.5 * x).sigmoid() / 2 + 1.25 * x * x.sigmoid(), None),
    ],
)
def test_a_rectifier_written_by_hand_is_the_layer(by_hand, layer):
    """The factors in it leave the signal as large as the layer does, which goes to x for large x."""
    tape, signal, (back,) = projected(by_hand, X)
    if layer is None:  # a decreasing gate goes to 1 for small x
        assert_same([back], [1.75 * signal.relu()])
        return
    assert torch.allclose(by_hand(X), layer(X), atol=1e-6)
    assert_same([back], [projected(layer, X).back[0]])
    assert CheckReport.of(tape).counts[UNSUPPORTED] == 0


@pytest.mark.parametrize(
    "gated",
    [
        lambda x, held: x * held(x.flip(1).sigmoid()),  # of other cells
        lambda x, held: x * held(F.conv2d(x, torch.ones(4, 4, 1, 1, dtype=x.dtype)).sigmoid()),
        lambda x, held: x * held((x + x.roll(1, 3)).sigmoid()),
        lambda x, held: (x + 1) * held(x.sigmoid()),  # shifted: no activation that is known
    ],
)
def test_a_gate_that_is_no_function_of_the_map_alone_is_a_gate(gated):
    tape, signal, back = projected(lambda x: gated(x, kept), X)
    assert_same(back, by_autograd(lambda x: gated(x, torch.Tensor.detach), [X], signal))
    assert GATE in kinds(tape, "mul")


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.GELU()])
def test_a_rectifiers_input_shared_with_a_skip_keeps_both_signals(layer):
    _, signal, (back,) = projected(lambda x: layer(x) + 2 * x, X)
    assert torch.equal(back, signal.clamp(min=0) + 2 * signal)


# ── pools and maxima: to where the maximum was ───────────────────────────────────────────────────────────

LINE, SPACE = (2, 4, 12), (1, 2, 4, 4, 3)
"""Views of the input as (N, C, L) and (N, C, D, H, W)."""

MAXIMA = {
    "max_pool1d": lambda x: F.max_pool1d(x.view(LINE), 3, 2, 1),
    "max_pool1d dilated": lambda x: F.max_pool1d(x.view(LINE), 3, 2, 1, 3, ceil_mode=True),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d of torch": lambda x: torch.max_pool2d(x, (2, 3), (2, 1), (1, 1)),
    "max_pool2d overlapping": nn.MaxPool2d(3, 1),
    "max_pool2d padded, ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "max_pool2d dilated": nn.MaxPool2d(2, 1, 1, 2),
    "max_pool2d unbatched": lambda x: F.max_pool2d(x[0], 2),
    "max_pool3d": lambda x: F.max_pool3d(x.view(SPACE), (2, 3, 2), 1, (1, 1, 0)),
    "max_pool3d dilated, ceil": lambda x: F.max_pool3d(x.view(SPACE), 2, (3, 2, 2), 1, (1, 2, 1), ceil_mode=True),
    "max_pool1d_with_indices": lambda x: F.max_pool1d(x.view(LINE), 3, return_indices=True)[0],
    "max_pool2d_with_indices": lambda x: F.max_pool2d(x, 2, 1, return_indices=True)[0],
    "max_pool2d_with_indices undone": lambda x: F.max_unpool2d(
        *F.max_pool2d(x, 2, return_indices=True), 2, output_size=X.shape
    ),
    "max_pool3d_with_indices": lambda x: nn.MaxPool3d(2, return_indices=True)(x.view(SPACE))[0],
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.view(LINE), 5),
    "adaptive_max_pool1d of torch": lambda x: torch.adaptive_max_pool1d(x.view(LINE), 5)[0],
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d((3, 2)),
    "adaptive_max_pool2d of all": nn.AdaptiveMaxPool2d(1),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x.view(SPACE), (3, None, 2)),
    "adaptive_max_pool1d_with_indices": lambda x: F.adaptive_max_pool1d(x.view(LINE), 5, return_indices=True)[0],
    "adaptive_max_pool2d_with_indices": lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True)[0],
    "adaptive_max_pool3d_with_indices": lambda x: F.adaptive_max_pool3d(x.view(SPACE), 2, return_indices=True)[0],
    "max": lambda x: x.max(),
    "max over a dimension": lambda x: x.max(1)[0],
    "max over a dimension, kept": lambda x: torch.max(x, dim=-1, keepdim=True).values,
    "max of two": lambda x: torch.max(x, x.flip(1) + 1e-3),
    "amax": lambda x: x.amax(1),
    "amax over several": lambda x: x.amax((3, 0), keepdim=True),
    "amax over all": lambda x: torch.amax(x),
    "max over numpy's axis": lambda x: x.max(axis=2).values,
    "amax over numpy's axes": lambda x: torch.amax(x, axis=(2, 3)),
    "amax as maxout": lambda x: x.view(2, 2, 2, 4, 3).amax(2),
    "maximum": lambda x: torch.maximum(x, OTHER),
    "maximum, constant first": lambda x: torch.maximum(OTHER, x),
    "maximum of two": lambda x: torch.maximum(x[:, :1], 2 * x),
    "fmax": lambda x: torch.fmax(2 * x, x[:1] + 1e-3),
}


@parametrised(MAXIMA)
def test_maxima_go_back_to_where_they_were(operation, case):
    tape, signal, back = projected(case, X)
    assert_same(back, by_autograd(case, [X], signal))
    assert kinds(tape, operation) == {EXACT}


@pytest.mark.parametrize(
    "function", [lambda x: x.max(1)[0], lambda x: x.amax((1, 2)), lambda x: torch.maximum(x[:, 0], x[:, 1])]
)
def test_of_equal_maxima_the_first_gets_the_signal(function):
    _, signal, (back,) = projected(function, torch.ones_like(X))
    expected = torch.zeros_like(back)
    if signal.dim() == 3:
        expected[:, :, 0, 0] = signal
    else:
        expected[:, :, 0] = signal
    assert torch.equal(back, expected)


# ── norms: their statistics are constants of the pass ────────────────────────────────────────────────────


def spread(x, *dims):
    """The biased variance."""
    return (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True)


def seeded(norm):
    """A norm in float64 with random scales, shifts and running statistics."""
    norm = norm.double()
    with torch.no_grad():
        for i, tensor in enumerate([*norm.parameters(), *norm.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(random(*tensor.shape, seed=i) ** 2 + 0.5)
    return norm


def channels(tensor):
    return tensor.view(-1, 1, 1)


BATCH = seeded(nn.BatchNorm2d(4, eps=0.1))
INSTANCE = seeded(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
GROUPS = seeded(nn.GroupNorm(2, 4))
LAYER = seeded(nn.LayerNorm([4, 3]))
RMS = seeded(nn.RMSNorm([4, 3], eps=0.1))

EXACT_NORMS = {
    "batch_norm": (BATCH.eval(), lambda x: channels(BATCH.weight / (BATCH.running_var + 0.1).sqrt())),
    "batch_norm without scale": (
        lambda x: F.batch_norm(x, random(4), random(4).square()),
        lambda x: channels(1 / (random(4).square() + 1e-5).sqrt()),
    ),
    "batch_norm by keyword": (
        lambda x: F.batch_norm(x, running_mean=random(4), running_var=random(4).square(), weight=random(4), eps=0.2),
        lambda x: channels(random(4) / (random(4).square() + 0.2).sqrt()),
    ),
    "batch_norm of vectors": (
        lambda x: F.batch_norm(x.view(-1, 4), random(4), random(4).square()).view(X.shape),
        lambda x: (1 / (random(4).square() + 1e-5).sqrt()).expand(24, 4).reshape(X.shape),
    ),
}

GENERALISED_NORMS = {
    "batch_norm training": (
        lambda x: F.batch_norm(x, random(4), random(4).square(), random(4), None, True),
        lambda x: channels(random(4)) / (spread(x, 0, 2, 3) + 1e-5).sqrt(),
    ),
    "batch_norm without running statistics": (
        nn.BatchNorm2d(4, affine=False, track_running_stats=False).eval(),
        lambda x: 1 / (spread(x, 0, 2, 3) + 1e-5).sqrt(),
    ),
    "instance_norm": (nn.InstanceNorm2d(4), lambda x: 1 / (spread(x, 2, 3) + 1e-5).sqrt()),
    "instance_norm training": (
        lambda x: F.instance_norm(x, weight=random(4), bias=random(4), eps=0.1),
        lambda x: channels(random(4)) / (spread(x, 2, 3) + 0.1).sqrt(),
    ),
    "instance_norm with running statistics": (
        INSTANCE.eval(),
        lambda x: channels(INSTANCE.weight / (INSTANCE.running_var + 1e-5).sqrt()),
    ),
    "group_norm": (
        GROUPS,
        lambda x: (
            channels(GROUPS.weight)
            / (spread(x.view(2, 2, 24), 2).view(2, 2, 1, 1).repeat_interleave(2, 1) + 1e-5).sqrt()
        ),
    ),
    "group_norm without scale": (
        nn.GroupNorm(1, 4, affine=False),
        lambda x: 1 / (spread(x, 1, 2, 3) + 1e-5).sqrt(),
    ),
    "layer_norm": (LAYER, lambda x: LAYER.weight / (spread(x, 2, 3) + 1e-5).sqrt()),
    "layer_norm of channels": (
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), [4], random(4), random(4)).permute(0, 3, 1, 2),
        lambda x: channels(random(4)) / (spread(x, 1) + 1e-5).sqrt(),
    ),
    "rms_norm": (RMS, lambda x: RMS.weight / (x.square().mean((2, 3), keepdim=True) + 0.1).sqrt()),
    "rms_norm without scale": (
        lambda x: F.rms_norm(x, [3]),
        lambda x: 1 / (x.square().mean(3, keepdim=True) + 2.0**-52).sqrt(),
    ),
    "normalize": (F.normalize, lambda x: 1 / x.square().sum(1, keepdim=True).sqrt()),
    "normalize by largest": (
        lambda x: F.normalize(x, math.inf, dim=(2, 3)),
        lambda x: 1 / x.abs().amax((2, 3), keepdim=True),
    ),
    "local_response_norm": (nn.LocalResponseNorm(3), lambda x: torch.ones_like(x)),
}


@parametrised(EXACT_NORMS | GENERALISED_NORMS)
def test_norms_go_back_by_scale_alone(operation, case):
    norm, scale = case
    tape, signal, back = projected(norm, X)
    assert_same(back, [(signal * scale(X)).detach()])
    exact = case in EXACT_NORMS.values()
    assert kinds(tape, operation) == (set() if exact else {GENERALISED})


# ── gates, masks and dropout: constants of the pass ──────────────────────────────────────────────────────


def squeeze(x):
    """Channel statistics (N, C, 1, 1), mixed."""
    return torch.einsum("nchw,cd->nd", x, random(4, 4, seed=7)).sub(1)[..., None, None]


def kept(gate):
    """The gate as the model has it."""
    return gate


def attention_of_heads(query, key, value, **options):
    """(L, N, 3) attended by one head of random weights."""
    heads = nn.MultiheadAttention(3, 1, bias=True).to(X.dtype).eval()
    for i, parameter in enumerate(heads.parameters()):
        parameter.data = random(*parameter.shape, seed=20 + i)
    return heads(query, key, value, **options)[0]


# Functions of x and ``held``, through which a gate goes: ``kept`` in the model, ``detach`` in the reference.
GATED = {
    "mul": lambda x, held: x * held(squeeze(x).sigmoid()),
    "mul, gate first": lambda x, held: held(torch.sigmoid(squeeze(x))) * x,
    "mul in place": lambda x, held: (x + 0).mul_(held(F.hardsigmoid(squeeze(x)))),
    "mul by torch": lambda x, held: torch.mul(input=x, other=held(torch.special.expit(squeeze(x)))),
    "mul by a viewed gate": lambda x, held: x * held(squeeze(x).flatten(1).sigmoid().view(2, 4, 1, 1)),
    "mul by an expanded gate": lambda x, held: x * held(squeeze(x).sigmoid().expand_as(x)),
    "mul by an indexed gate": lambda x, held: x * held(squeeze(x).flatten(1).sigmoid()[:, :, None, None]),
    "mul by the complement": lambda x, held: x * held(1 - squeeze(x).sigmoid()),
    "mul by a scaled gate": lambda x, held: x * held(1 + 0.5 * squeeze(x).sigmoid() * OTHER[:, :, :1, :1]),
    "mul by a linear gate": lambda x, held: x * held(squeeze(x)),
    "mul by a linear gate, expanded": lambda x, held: held(squeeze(x).expand_as(x)) * x.flip(1),
    "mul by a linear gate of each place": lambda x, held: x * held(x.sum(1)[:, None]),
    "mul by a number": lambda x, held: x.abs().mean() * x if held is kept else x * x.abs().mean().detach(),
    "div by a sum": lambda x, held: x / held(x.exp().sum(1, keepdim=True)),
    "mul by a half that GELU activates": lambda x, held: held(F.gelu(x[:, :2])) * x[:, 2:],
    "mul by a half that ReLU activates": lambda x, held: (x.flip(1) + 0).mul_(held(F.relu(x))),
    "mul by attention over places": lambda x, held: x * held(x.mean(1).flatten(1).softmax(1).view(2, 1, 4, 3)),
    "mul by attention over branches": lambda x, held: sum(
        branch * held(gate)
        for branch, gate in zip(
            (x, x.flip(3)), torch.stack([squeeze(x), squeeze(2 * x)]).softmax(0).unbind(0), strict=True
        )
    ),
    "mul by a map of gates": lambda x, held: (
        F.conv2d(x, FILTERS[2], groups=2) * held(torch.sigmoid(F.conv2d(x, -FILTERS[2], groups=2)))
    ),
    "mul narrower than its gate": lambda x, held: x.sum(1, keepdim=True) * held(squeeze(x).sigmoid()),
    "mul of two gates, the second held": lambda x, held: squeeze(x).sigmoid() * held(x.sigmoid()),
    "relu6 as a hard sigmoid": lambda x, held: x * held(F.relu6(squeeze(x) + 3) / 6),
    "clamp as a hard sigmoid": lambda x, held: held((squeeze(x) + 1).clamp(0, 2).div(2)) * x,
    "hardtanh as a hard sigmoid": lambda x, held: x * held(F.hardtanh(squeeze(x) + 3, 0, 6)) / 6,
    "tanh of other cells": lambda x, held: x * held(torch.tanh(F.softplus(x.flip(1)))),
    "erf of other cells": lambda x, held: 0.5 * x * held(1 + torch.erf(x.roll(1, 2) / 2**0.5)),
    "glu": lambda x, held: F.glu(x, 1) if held is kept else x[:, :2] * held(x[:, 2:].sigmoid()),
    "glu of the last axis": lambda x, held: (
        nn.GLU()(x.mT) if held is kept else (x.mT[..., :2] * held(x.mT[..., 2:].sigmoid()))
    ),
    "mul by a mask": lambda x, held: x * held((x > 0).to(x.dtype)),
    "mul by a comparison": lambda x, held: x * (x > 0),
    "mul by a detached map": lambda x, held: x * x.detach(),
    "div by a detached length": lambda x, held: x / x.detach().norm(dim=1, keepdim=True),
    "masked_fill of the small": lambda x, held: x.masked_fill(x < 0.5, 0),
    "where large": lambda x, held: torch.where(x.abs() > 0.5, x, 0.1 * x),
    "getitem of the positive": lambda x, held: x[x > 0],
    "gather of the largest": lambda x, held: x.gather(1, x.argmax(1, keepdim=True)),
    "index_select of the largest": lambda x, held: x.index_select(1, x.sum((0, 2, 3)).argsort()[:2]),
    "matmul of a detached map": lambda x, held: x.detach() @ x.mT,
    "matmul of attention": lambda x, held: F.dropout(held((x @ x.mT / 2).softmax(-1)), training=False) @ x,
    "bmm of attention": lambda x, held: torch.bmm(x.flatten(2), held(torch.sigmoid(x.flatten(2).mT @ x.flatten(2)))),
    "mm of attention": lambda x, held: torch.mm(held(x[0, 0].softmax(1)), mat2=x[1, 1, :3]),
    "einsum of attention": lambda x, held: torch.einsum(
        "nqk,nck->ncq", held(torch.einsum("ncq,nck->nqk", x.flatten(2), x.flatten(2)).softmax(2)), x.flatten(2)
    ),
    "conv1d by filters of the image": lambda x, held: F.conv1d(x[:, 0], held(x[0, :, :, :2])),
    "conv2d by a mixture of filters for each image": lambda x, held: F.conv2d(
        x.reshape(1, 8, 4, 3),
        held((squeeze(x).flatten(1).sigmoid() @ FILTERS[2].view(4, 12).repeat(1, 4)).view(12, 2, 2, 2)),
        held(x.sum((2, 3))).flatten().repeat_interleave(2)[:12],
        groups=4,
    ),
    "conv3d by filters of the image": lambda x, held: F.conv3d(
        weight=held(FILTERS[3] * squeeze(x).sum()), input=x[:, None].expand(-1, 4, -1, -1, -1), padding=1, groups=2
    ),
    "scaled_dot_product_attention": lambda x, held: F.scaled_dot_product_attention(held(x), held(x), x),
    "scaled_dot_product_attention, one query": lambda x, held: F.scaled_dot_product_attention(
        query=OTHER[:, :, :1], key=held(x), value=2 * x, is_causal=True
    ),
    "multi_head_attention_forward": lambda x, held: attention_of_heads(held(x[0]), held(x[0]), x[0]),
    "multi_head_attention_forward, one query": lambda x, held: attention_of_heads(
        held(x[1].mean(0, True)), held(x[1]), 2 * x[1], need_weights=False
    ),
}


def power(x):
    """The mean square over channels, (N, 1, H, W)."""
    return x.pow(2).mean(1, keepdim=True) + 0.1


def response_norm(x, held):
    """ConvNeXt V2's global response normalisation."""
    lengths = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    return nn.Parameter(random(4, 1, 1)) * (x * held(lengths / (lengths.mean(1, keepdim=True) + 1e-6))) + x


NORMS_BY_HAND = {
    "sqrt": lambda x, held: x / held(torch.sqrt(power(x))),
    "sqrt of a variance": lambda x, held: (x - x.mean(1, True)) / held((x.var(1, keepdim=True) + 0.1).sqrt()),
    "rsqrt": lambda x, held: x * held(torch.rsqrt(power(x))),
    "norm": lambda x, held: x / held(x.norm(dim=1, keepdim=True)),
    "norm of responses": response_norm,
    "linalg_norm": lambda x, held: x.clone().div_(held(torch.linalg.norm(x, dim=1, keepdim=True).clamp(min=1e-6))),
    "linalg_vector_norm": lambda x, held: x / held(torch.linalg.vector_norm(x, dim=1, keepdim=True).expand_as(x)),
    "std": lambda x, held: torch.div(x - x.mean((2, 3), True), other=held(x.std((2, 3), keepdim=True) + 1e-3)),
    "var": lambda x, held: x / held(x.var(1, keepdim=True)),
    "pow": lambda x, held: x * held(power(x) ** -0.5),
    "float_power": lambda x, held: x / held(power(x).float_power(0.75)),
    "reciprocal": lambda x, held: x * held(torch.maximum(power(x).sqrt(), torch.tensor(0.1)).reciprocal()),
    "__rdiv__": lambda x, held: x * held(1 / power(x).sqrt()),
}


@parametrised(NORMS_BY_HAND)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_statistics_of_a_norm_written_by_hand_are_constants_of_the_pass(operation, case, gradient):
    tape, signal, back = projected(lambda x: case(x, kept), X, gradient=gradient)
    assert_same(back, by_autograd(lambda x: case(x, torch.Tensor.detach), [X], signal))
    assert operation in {step.operation for step in tape.steps}
    report = CheckReport.of(tape)
    assert report.supported and report.counts[GATE] >= 2 and not report.counts[GRADIENT]


def test_a_layer_norm_written_by_hand_is_the_layer_norm_of_the_centred_signal():
    def by_hand(x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5)

    def layer_norm(x):
        return F.layer_norm(x.permute(0, 2, 3, 1), [4]).permute(0, 3, 1, 2)

    assert torch.allclose(by_hand(X), layer_norm(X))
    (back,), (scaled,) = projected(by_hand, X).back, projected(layer_norm, X).back
    assert_same([back], [scaled - scaled.mean(2, keepdim=True)])


def test_check_lists_a_statistic_that_a_signal_reaches_as_unsupported():
    def norm_and_length(x):
        length = x.norm(dim=1, keepdim=True)
        return torch.cat([x / length, length], 1)

    with pytest.raises(UnsupportedOperation, match="'norm'"):
        projected(norm_and_length, X)
    assert kinds(watch(Applied(norm_and_length), [X])[0], "norm") == {UNSUPPORTED}


@parametrised(GATED)
def test_gates_and_masks_are_constants_of_the_pass(operation, case):
    tape, signal, back = projected(lambda x: case(x, kept), X)
    assert_same(back, by_autograd(lambda x: case(x, torch.Tensor.detach), [X], signal))
    assert kinds(tape, operation) == {GATE}


@pytest.mark.parametrize("training", [False, True])
def test_attention_that_drops_weights_is_unsupported(training):
    for dropout, supported in ((0.0, True), (0.5, not training)):
        heads = nn.MultiheadAttention(3, 1, dropout=dropout).to(X.dtype).train(training)
        tape = watch(Applied(lambda x, heads=heads: heads(x[0], x[0], x[0])[0]), [X])[0]
        assert kinds(tape, "multi_head_attention_forward") == {GATE if supported else UNSUPPORTED}


def test_check_lists_a_sigmoid_that_gates_as_a_gate_and_another_as_a_gradient():
    tape = projected(lambda x: x * squeeze(x).sigmoid(), X).tape
    assert kinds(tape, "sigmoid") == {GATE}
    assert kinds(projected(torch.sigmoid, X).tape, "sigmoid") == {GRADIENT}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("bounded", [F.relu6, torch.tanh])
@pytest.mark.parametrize("first", [False, True])
def test_of_a_sigmoid_and_another_bounded_map_the_sigmoid_is_the_gate(bounded, first, gradient):
    product = lambda x: x.sigmoid() * bounded(x) if first else bounded(x) * x.sigmoid()  # noqa: E731
    tape = watch(Applied(product), [X], gradient=gradient)[0]
    (sigmoid,) = [i for i, step in enumerate(tape.steps) if step.operation == "sigmoid"]
    assert tape.steps[-1].gate == sigmoid


@pytest.mark.parametrize("bounded", [F.relu6, torch.tanh])
@pytest.mark.parametrize("first", [False, True])
def test_a_bounded_map_that_was_gated_is_the_map_beside_the_next_gate(bounded, first):
    """Of channels, then of places; h of a recurrent cell."""

    gates = []

    def gated_twice(x):
        x, channels = bounded(x), squeeze(x).sigmoid()
        x = channels * x if first else x * channels
        places = x.mean(1, keepdim=True).sigmoid()
        gates[:] = channels, places
        return places * x

    tape, signal, (back,) = projected(gated_twice, X, gradient=True)
    assert kinds(tape, "sigmoid") == {GATE}
    signal = signal * gates[0] * gates[1]
    assert_same([back], [signal.relu() if bounded is F.relu6 else signal * (1 - X.tanh().square())])


@pytest.mark.parametrize("statistic", [lambda x: x.std(), lambda x: torch.rsqrt(power(x))])
def test_of_a_statistic_and_what_relu6_gives_the_statistic_is_the_gate(statistic):
    for product in (lambda x: F.relu6(x) * statistic(x), lambda x: statistic(x) * F.relu6(x)):
        tape, signal, (back,) = projected(product, X)
        assert_same([back], [(signal * statistic(X)).relu()])


@pytest.mark.parametrize("gate", [lambda x: F.relu6(squeeze(x) + 3) / 6, lambda x: squeeze(x)])
def test_what_is_broadcast_is_the_gate_of_what_relu6_gives(gate):
    for product in (lambda x: F.relu6(x) * gate(x), lambda x: gate(x) * F.relu6(x)):
        tape, signal, (back,) = projected(product, X)
        assert_same([back], [(signal * gate(X)).relu()])
        assert CheckReport.of(tape).supported


def test_of_two_activated_maps_that_which_only_their_product_takes_is_the_gate():
    def gated(x):
        map = F.relu(x)
        return map * F.silu(map.flip(1))

    _, signal, (back,) = projected(gated, X)
    assert_same([back], [(signal * F.silu(F.relu(X).flip(1))).relu()])


@pytest.mark.parametrize(
    "product",
    [
        lambda x: F.relu(x) * F.gelu(x.flip(1)),
        lambda x: torch.mul(*[F.gelu(x)] * 2),
        lambda x: F.gelu(squeeze(x)) * x.sum(1, keepdim=True),
        lambda x: x.flip(1) / F.softplus(x),
        lambda x: (map := F.gelu(x)) * map.flip(1),
    ],
    ids=[
        "two activated maps",
        "a map and itself",
        "an outer product",
        "a quotient",
        "a map and linear attention to it",
    ],
)
def test_which_of_two_maps_is_the_gate_is_not_guessed(product):
    assert not Deconvnet(Applied(product)).check(X).supported


@pytest.mark.parametrize(
    "mix",
    [lambda gate: gate @ gate.new_ones(3, 3), lambda gate: F.linear(gate, gate.new_ones(3, 3))],
    ids=["matmul", "linear"],
)
def test_a_mixture_of_gates_is_no_gate(mix):
    tape, _ = watch(Applied(lambda x: x * mix(x.sigmoid())), [X])
    assert kinds(tape, "mul") == {UNSUPPORTED}


def test_squeeze_and_excitation_of_torchvision():
    layer = SqueezeExcitation(4, 2).double()
    _, signal, back = projected(layer, X)
    assert_same(back, [signal * layer._scale(X).detach()])


def test_a_layer_scale_is_generalised_and_its_own_adjoint():
    gamma = nn.Parameter(random(4, 1, 1))
    for function in (lambda x: gamma * x, lambda x: x + x * gamma):
        tape, signal, back = projected(function, X)
        assert_same(back, by_columns(lambda x, f=function: f(x).detach(), [X], signal))
        assert kinds(tape, "mul") == {GENERALISED}


DROPOUTS = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: nn.Dropout(0.6, inplace=True)(x.clone()),
    "dropout of torch": lambda x: torch.dropout(x, 0.5, train=True),
    "dropout of everything": lambda x: F.dropout(x, 1.0),
    "dropout1d": lambda x: F.dropout1d(x.flatten(2)),
    "dropout2d": nn.Dropout2d(),
    "dropout3d": lambda x: nn.Dropout3d(inplace=True)(x[:, :, None] + 0),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "alpha_dropout": nn.AlphaDropout(),
    "feature_alpha_dropout": nn.FeatureAlphaDropout(),
}


@parametrised(DROPOUTS)
def test_dropout_in_train_mode_is_the_mask_that_was_drawn(operation, case):
    def function(x):
        torch.manual_seed(5)
        return case(x)

    tape, signal, back = projected(function, X)
    assert_same(back, by_autograd(function, [X], signal))
    assert kinds(tape, operation) == {GATE}


@parametrised(DROPOUTS | {"rrelu": lambda x: F.rrelu(x, training=True)})
def test_random_operations_draw_as_without_us(operation, case):
    model = Applied(case)
    torch.manual_seed(5)
    expected, after = model(X), torch.get_rng_state()
    torch.manual_seed(5)
    with Deconvnet(model) as deconv:
        assert torch.equal(model(X), expected)
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(6)
        later = torch.get_rng_state()
        (value,) = deconv._recorded().calls[-1].outputs
        assert_same([deconv._recorded().replay(value)], [expected], 1e-15)
        deconv.project("", 0)
    assert torch.equal(torch.get_rng_state(), later)


# ── heads, and what has no rule ──────────────────────────────────────────────────────────────────────────

HEADS = {
    "softmax": lambda x: x.softmax(1),
    "softmax by F": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda x: x.clone().sigmoid_(),
    "hardsigmoid": lambda x: nn.Hardsigmoid(inplace=True)(x.clone()),
    "special_expit": torch.special.expit,
}


@parametrised(HEADS)
def test_heads_have_their_plain_gradient(operation, case):
    tape, signal, back = projected(case, X)
    assert_same(back, by_autograd(case, [X], signal))
    assert kinds(tape, operation) == {GRADIENT}


WITHOUT_RULE = {
    "tanh": torch.tanh,
    "tanh in place": lambda x: x.clone().tanh_(),
    "exp": torch.exp,
    "abs": torch.abs,
    "mul": lambda x: x * x,
    "mul by another map": lambda x: x * x.flip(1),
    "mul, outer": lambda x: x.sum((2, 3), keepdim=True) * x.sum(1, keepdim=True),
    "div, outer": lambda x: x.sum((2, 3), keepdim=True) / (x[:, :1] + 9),
    "pow": lambda x: x**2,
    "square": torch.square,
    "sqrt": lambda x: (x + 9).sqrt(),
    "div": lambda x: x / (x.flip(1) + 9),
    "div rounded": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "div of a constant": lambda x: torch.div(OTHER, x + 9),
    "reciprocal": lambda x: (x + 9).reciprocal(),
    "__rdiv__": lambda x: 1 / (x + 9),
    "matmul": lambda x: x @ x.mT,
    "matmul of bounded maps": lambda x: x.tanh() @ x.mT,
    "matmul of weights": lambda x: x.softmax(1) @ x.softmax(2).mT,
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    "linear": lambda x: F.linear(x, x[0, 0]),
    "grid_sample": lambda x: F.grid_sample(OTHER, x[..., :2] / 4, align_corners=False),
    "scaled_dot_product_attention of constants": lambda x: F.scaled_dot_product_attention(x, x, OTHER),
    "multi_head_attention_forward of constants": lambda x: attention_of_heads(x[0], x[0], OTHER[0]),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 1).values,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp from above": lambda x: x.clamp(max=0.5),
    "clamp by a tensor": lambda x: x.clamp(min=torch.zeros(3)),
    "hardtanh": F.hardtanh,
    "threshold": lambda x: F.threshold(x, 0.5, 0),
    "threshold to another value": lambda x: F.threshold(x, 0, -1),
    "minimum": lambda x: torch.minimum(x, OTHER),
    "norm": lambda x: x.norm(dim=1),
    "std": lambda x: x.std(1),
    "log_sigmoid": F.logsigmoid,
    "softmin": lambda x: F.softmin(x, 1),
    "tanhshrink": F.tanhshrink,
    "lp_pool2d": lambda x: F.lp_pool2d(x + 9, 2, 2),
    "fft_irfft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * (2 + 1j), s=x.shape[-2:]),
    "real": lambda x: torch.fft.fft2(x).real,
    "addcmul": lambda x: torch.addcmul(x, x, x.flip(1)),
    "addmm": lambda x: torch.addmm(OTHER[0, 0, :, :1], x[0, 0], x[1, 1].mT),
}


@parametrised(WITHOUT_RULE)
def test_an_operation_without_a_rule_is_refused_or_has_its_gradient(operation, case):
    model = nn.Sequential(nn.Identity(), Applied(case))
    with pytest.raises(UnsupportedOperation) as error:
        projected(model, X)
    for part in (repr(operation), "layer '1'", 'on_unsupported="gradient"'):
        assert part in str(error.value)
    assert not Deconvnet(model).check(X).supported

    tape, signal, back = projected(model, X, gradient=True)
    assert_same(back, by_autograd(case, [X], signal))
    assert kinds(tape, operation) == {GRADIENT}


@pytest.mark.parametrize(
    "power",
    [
        lambda x: F.leaky_relu(x).square(),
        lambda x: (F.relu(x) - 1) ** 2,
        lambda x: F.softplus(x).pow(-2),
        lambda x: torch.pow(2, F.relu(x)),
    ],
    ids=["negative base", "shifted base", "negative exponent", "of a constant"],
)
def test_a_power_that_does_not_rectify_is_refused(power):
    assert not Deconvnet(Applied(power)).check(X).supported


def test_an_operation_without_a_rule_does_not_matter_where_no_signal_comes():
    tape, signal, (back,) = projected(lambda x: 2 * x if x.exp().mean() > 0 and (x == x).all() else x, X)
    assert torch.equal(back, 2 * signal)
    assert kinds(tape, "exp") == set(), "nor is it listed"
    assert {step.operation for step in tape.steps} == {"exp", "mean", "mul"}, "a mask carries no signal"


def test_check_knows_what_a_signal_reaches_where_the_output_is_an_object_of_the_models_own():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    tape, _ = watch(Applied(lambda x: Output((x / x.norm(dim=1, keepdim=True)).exp())), [X])
    assert kinds(tape, "exp") == {UNSUPPORTED} and kinds(tape, "norm") == {GATE}


# ── the table itself ─────────────────────────────────────────────────────────────────────────────────────


def test_every_row_is_exercised():
    tables = (LINEAR, RECTIFIERS, GENERALISED_RECTIFIERS, MAXIMA, EXACT_NORMS, GENERALISED_NORMS, NORMS_BY_HAND, GATED)
    cases = {name(key) for table in (*tables, DROPOUTS, HEADS) for key in table}
    assert cases == set(RULES)


# ── geometry, at random ──────────────────────────────────────────────────────────────────────────────────


def layer(kind, x, *arguments, **options):
    """The layer of torch for as many dimensions as ``x`` has, in float64."""
    return getattr(nn, f"{kind}{x.dim() - 2}d")(*arguments, **options).double()


@at_random
@given(geometries(most_padding=lambda kernel: 2), st.sampled_from([1, 2]), st.sampled_from([2, 4]))
def test_convolutions_of_any_geometry(geometry, groups, filters):
    x = random(1, 2, *geometry.size)
    convolution = layer("Conv", x, 2, filters, groups=groups, **geometry.options)
    _, signal, back = projected(convolution, x)
    with torch.no_grad():
        assert_same(back, by_columns(convolution, [x], signal))


@pytest.mark.parametrize("channels", [1, 4, 5])
@pytest.mark.parametrize(
    "kernel, stride, padding", [((7, 7), 2, 3), ((11, 3), 4, (2, 0)), ((4, 4), 4, 0), ((1, 2), 3, 0)]
)
def test_a_strided_filter_of_few_channels(channels, kernel, stride, padding):
    """It goes back by the phases of its stride, for several images or maps."""
    convolution = nn.Conv2d(channels, 6, kernel, stride, padding).double()
    images = random(3, channels, 23, 18).requires_grad_()
    output = convolution(images)
    seed = torch.zeros_like(output)
    seed[:, 2] = output[:, 2].detach()
    (expected,) = torch.autograd.grad(output, images, seed)
    found = Deconvnet(convolution).project("", [1, 2], inputs=images.detach(), position="all")[:, 1]
    assert (found - expected).abs().max() < 1e-12


@at_random
@given(geometries(most_padding=lambda kernel: (kernel - 1) // 2), st.sampled_from([1, 2]), st.data())
def test_transposed_convolutions_of_any_geometry(geometry, groups, data):
    x = random(1, 2, *geometry.size)
    most = [max(pair) - 1 for pair in zip(geometry.stride, geometry.dilation, strict=True)]
    output_padding = data.draw(st.tuples(*[st.integers(0, m) for m in most]))
    options = geometry.options | {"groups": groups, "output_padding": output_padding}
    convolution = layer("ConvTranspose", x, 2, 2, **options)
    _, signal, back = projected(convolution, x)
    with torch.no_grad():
        assert_same(back, by_columns(convolution, [x], signal))


@at_random
@given(geometries(), st.booleans())
def test_max_pools_of_any_geometry(geometry, ceil_mode):
    x = random(1, 2, *geometry.size)
    pool = layer("MaxPool", x, ceil_mode=ceil_mode, **geometry.options)
    _, signal, back = projected(pool, x)
    assert_same(back, by_autograd(pool, [x], signal))


@at_random
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3))
def test_adaptive_max_pools_of_any_geometry(sizes):
    x = random(1, 2, *(size for size, _ in sizes))
    pool = layer("AdaptiveMaxPool", x, tuple(output for _, output in sizes))
    _, signal, back = projected(pool, x)
    assert_same(back, by_autograd(pool, [x], signal))


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer, x: buffer.copy_(x),
        lambda buffer, x: (buffer.__setitem__((slice(None), 1), x[:, 2]), buffer)[1],
        lambda buffer, x: buffer.index_copy_(1, torch.tensor([0, 2]), x[:, :2].to(buffer.dtype)),
    ],
)
def test_a_buffer_of_another_dtype_does_not_round_the_signal(write):
    def model(dtype):
        return lambda x: write(torch.zeros(X.shape, dtype=dtype), x)

    _, _, (rounded,) = projected(model(torch.bfloat16), X)
    _, _, (exact,) = projected(model(X.dtype), X)
    assert torch.equal(rounded, exact)
