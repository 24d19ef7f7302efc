"""Networks of random operations, on values of random shapes: side by side, through views and in place."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Values = list[Tensor]
Operation = Callable[[Values], "Tensor | Values"]
Kind = Callable[["RandomNetwork", Values], Operation]


class RandomNetwork(nn.Module):
    """Scores (N, 5) of images (N, C, H, W) in double, from 4 to 14 operations that a seed draws.

    Each takes values of the operations before it, mostly the latest ones, and may overwrite them.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self._numbers = torch.Generator().manual_seed(seed)
        self.shape = (self.draw.choice([1, 3, 4]), self.draw.randint(9, 26), self.draw.randint(9, 26))
        values: Values = [self.numbers(1, *self.shape)]
        self.names: list[str] = []
        self._operations: list[Operation] = []
        wanted = self.draw.randint(4, 14)
        while len(self._operations) < wanted:
            (name,) = self.draw.choices(list(KINDS), WEIGHTS)
            try:
                operation = KINDS[name][1](self, values)
                found = as_list(operation(values))
            except (RuntimeError, IndexError, ValueError):  # it does not fit the values that were drawn
                continue
            if all(map(usable, found)):
                values += found
                self.names.append(name)
                self._operations.append(operation)
        self._matrix = self.numbers(5, values[-1].numel())

    def forward(self, images: Tensor) -> Tensor:
        """The scores."""
        values = [images]
        for operation in self._operations:
            values += as_list(operation(values))
        return F.linear(values[-1].flatten(1), self._matrix)

    def numbers(self, *shape: int) -> Tensor:
        """Random numbers; as a filter's taps they keep the scale."""
        numbers = torch.randn(shape, generator=self._numbers, dtype=torch.float64)
        return numbers / numbers[0].numel() ** 0.5 if len(shape) > 2 else numbers

    def one(self, values: Values) -> int:
        """The number of a value."""
        return self.draw.randrange(0 if self.draw.random() < 0.2 else max(0, len(values) - 3), len(values))

    def twin(self, values: Values, of: int, dims: slice = slice(None)) -> int:
        """The number of a value whose shape is the same along ``dims``."""
        return self.draw.choice([i for i, value in enumerate(values) if value.shape[dims] == values[of].shape[dims]])


def usable(value: Tensor) -> bool:
    """Whether further operations can take a value: some feature maps of one image, of no great size."""
    return value.dim() == 4 and len(value) == 1 and 0 < value.numel() < 60_000 and bool(value.abs().max() < 1e4)


def as_list(found: Tensor | Values) -> Values:
    """One value or several."""
    return [found] if isinstance(found, Tensor) else list(found)


def one_value(*functions: Callable[[Tensor], Tensor | Values]) -> Kind:
    """One of some functions of one value."""

    def kind(network: RandomNetwork, values: Values) -> Operation:
        i, function = network.one(values), network.draw.choice(functions)
        return lambda values: function(values[i])

    return kind


def two_values(*functions: Callable[[Tensor, Tensor], Tensor]) -> Kind:
    """One of some functions of two values of one shape."""

    def kind(network: RandomNetwork, values: Values) -> Operation:
        i, function = network.one(values), network.draw.choice(functions)
        j = network.twin(values, i)
        return lambda values: function(values[i], values[j])

    return kind


def convolution(network: RandomNetwork, values: Values) -> Operation:
    """Of any geometry that fits, dense, grouped or by channel."""
    draw, i = network.draw, network.one(values)
    channels = values[i].shape[1]
    groups = draw.choice([g for g in (1, 1, 1, 2, channels) if channels % g == 0])
    outward = groups * draw.choice([1, 2, 4, 8]) if groups < 3 else channels
    kernel = draw.choice([(3, 3), (3, 3), (1, 1), (1, 1), (2, 2), (5, 3), (1, 7)])
    weight = network.numbers(outward, channels // groups, *kernel)
    bias = draw.choice([None, network.numbers(outward)])
    stride, dilation = draw.choice([1, 1, 1, 2, (2, 1), 3]), draw.choice([1, 1, 1, 2])
    padding = draw.choice([0, 1, (kernel[0] // 2, kernel[1] // 2), kernel, "same" if stride == 1 else "valid"])
    return lambda values: F.conv2d(values[i], weight, bias, stride, padding, dilation, groups)


def pool(network: RandomNetwork, values: Values) -> Operation:
    """The largest or the mean of windows."""
    draw, i = network.draw, network.one(values)
    kernel, stride, padding = draw.choice([2, 3, (3, 2)]), draw.choice([1, 2, None]), draw.choice([0, 0, 1])
    ceil = draw.random() < 0.3
    if draw.random() < 0.5:
        dilation = draw.choice([1, 1, 2])
        return lambda values: F.max_pool2d(values[i], kernel, stride, padding, dilation, ceil)
    counted = draw.random() < 0.5
    return lambda values: F.avg_pool2d(values[i], kernel, stride, padding, ceil, counted)


def batch_norm(network: RandomNetwork, values: Values) -> Operation:
    """In eval mode."""
    i = network.one(values)
    mean, deviation, weight, bias = (network.numbers(values[i].shape[1]) for _ in range(4))
    return lambda values: F.batch_norm(values[i], mean, deviation**2 + 0.5, weight, bias)


def with_constant(network: RandomNetwork, values: Values) -> Operation:
    """A value and a constant of a shape that is broadcast to it."""
    i = network.one(values)
    _, channels, height, width = values[i].shape
    shapes = [(channels, 1, 1), (1, channels, height, width), (height, width), (1, 1, height, 1), (1,)]
    constant = network.numbers(*network.draw.choice(shapes))
    function = network.draw.choice([torch.add, torch.mul, torch.rsub])
    return lambda values: function(values[i], constant)


def joined(network: RandomNetwork, values: Values) -> Operation:
    """Values of one extent, and perhaps channels that are constant."""
    i = network.one(values)
    others = [network.twin(values, i, slice(2, None)) for _ in range(network.draw.randint(1, 3))]
    constant = network.numbers(1, 2, *values[i].shape[2:])[:, : network.draw.randint(0, 2)]
    return lambda values: torch.cat(
        [values[k] for k in (i, *others)] + [constant.expand(len(values[i]), -1, -1, -1)], 1
    )


def gate(network: RandomNetwork, values: Values) -> Operation:
    """Squeeze-and-excite, or a gate of each cell."""
    i = network.one(values)
    weight = network.numbers(values[i].shape[1], values[i].shape[1], 1, 1)
    if network.draw.random() < 0.5:
        return lambda values: values[i] * F.conv2d(values[i].mean((2, 3), keepdim=True), weight).sigmoid()
    return lambda values: values[i] * values[i].mean(1, keepdim=True).sigmoid()


def in_place(network: RandomNetwork, values: Values) -> Operation:
    """What the network has made so far, written over: whole, or through a view."""
    if len(values) < 2:
        raise ValueError("nothing to write to")
    i = network.draw.choice([len(values) - 1, network.draw.randrange(1, len(values))])
    j, middle = network.twin(values, i), values[i].shape[1] // 2

    def through_view(value: Tensor) -> Tensor:
        value[:, :middle].mul_(0.5)
        return value

    def part(value: Tensor) -> Tensor:
        value[:, middle:] += 1
        return value

    functions = [
        torch.relu_,
        lambda value: F.silu(value, inplace=True),
        lambda value: value.add_(0.3),
        through_view,
        part,
    ]
    function = network.draw.choice(functions)
    if network.draw.random() < 0.3:
        return lambda values: values[i].add_(values[j])
    return lambda values: function(values[i])


def laid_out_otherwise(network: RandomNetwork, values: Values) -> Operation:
    """An operation on a value whose axes are others: as pictures or lines of their own, as tokens, with more axes."""
    i, draw = network.one(values), network.draw
    _, channels, height, width = values[i].shape
    smooth, mixing, tall = (
        network.numbers(*shape) for shape in ((1, 1, 3, 3), (channels, channels, 3), (1, 1, 3, 1, 3))
    )

    def each_channel(x: Tensor) -> Tensor:
        return F.conv2d(x.reshape(-1, 1, height, width), smooth, padding=1).view(x.shape)

    def each_row(x: Tensor) -> Tensor:
        rows = F.conv1d(x.transpose(1, 2).reshape(-1, channels, width), mixing, padding=1)
        return rows.unflatten(0, (-1, height)).transpose(1, 2)

    def each_half(x: Tensor) -> Tensor:
        halves = x[..., : width // 2 * 2].unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1)
        return F.max_pool2d(halves, 3, 1, 1).unflatten(0, (-1, 2)).movedim(1, 3).flatten(3)

    def tokens(x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        return (rows @ rows.transpose(1, 2)).softmax(2).matmul(rows).transpose(1, 2).view(x.shape)

    def one_by_one(x: Tensor) -> Tensor:
        return torch.stack([F.avg_pool2d(one, 3, 1, 1) for one in x])

    def a_volume(x: Tensor) -> Tensor:
        return F.conv3d(x.unsqueeze(1), tall, padding=(1, 0, 1)).squeeze(1)

    def in_groups(x: Tensor) -> Tensor:
        return x.unflatten(1, (channels // 2, 2)).amax(2)

    def of_all_cells(x: Tensor) -> Tensor:
        return x.flatten(2).softmax(-1).view_as(x) * x

    function = draw.choice([each_channel, each_row, each_half, tokens, one_by_one, a_volume, in_groups, of_all_cells])
    return lambda values: function(values[i])


def shuffled(value: Tensor) -> Tensor:
    """A channel shuffle of two groups."""
    return value.reshape(len(value), 2, -1, *value.shape[2:]).transpose(1, 2).flatten(1, 2)


def norm_of_channels(value: Tensor) -> Tensor:
    """At each cell by itself, with the channels last."""
    return F.layer_norm(value.permute(0, 2, 3, 1), value.shape[1:2]).permute(0, 3, 1, 2)


def summed_from_zero(value: Tensor) -> Tensor:
    """A sum that begins with a constant."""
    total = torch.zeros_like(value)
    total += value
    return total


KINDS: dict[str, tuple[int, Kind]] = {
    "convolution": (6, convolution),
    "pool": (3, pool),
    "in place": (3, in_place),
    "joined": (3, joined),
    "batch norm": (2, batch_norm),
    "with a constant": (1, with_constant),
    "gate": (1, gate),
    "nonlinearity": (1, one_value(F.relu, F.gelu, F.hardswish, F.elu, torch.sigmoid, torch.abs)),
    "by hand": (1, one_value(lambda x: x.clamp(min=0), lambda x: x * x.sigmoid(), lambda x: torch.maximum(x, 0.1 * x))),
    "two": (1, two_values(torch.add, torch.sub, torch.mul, torch.maximum, lambda x, y: x * y.sigmoid())),
    "norm": (1, one_value(norm_of_channels, lambda x: F.local_response_norm(x, 3), lambda x: F.normalize(x, dim=1))),
    "cut": (1, one_value(lambda x: x.chunk(2, 1), lambda x: x.split([1, x.shape[1] - 1], 1), lambda x: x[:, 1:])),
    "cells": (1, one_value(lambda x: x[:, :, ::2, ::2], lambda x: x[..., 1:, :-1], lambda x: x.flip(2), shuffled)),
    "padded": (1, one_value(lambda x: F.pad(x, (1, 2, 0, 1)), lambda x: F.pad(x, (1, 1, 2, 0), "reflect"),
                            lambda x: F.pad(x, (0, 1, 1, 1), "circular"), lambda x: F.pad(x, (-1, 1, 2, -1), value=2))),
    "enlarged": (1, one_value(lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, scale_factor=1.5),
                              lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))),
    "summary": (1, one_value(lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, (3, 2)),
                             lambda x: x + x.sum(2, keepdim=True), lambda x: x.mean(1, keepdim=True))),
    "laid out otherwise": (1, laid_out_otherwise),
    "other": (1, one_value(lambda x: x.transpose(2, 3), torch.clone, summed_from_zero, lambda x: F.pixel_shuffle(x, 2),
                           lambda x: torch.stack([x, 2 * x], 2).flatten(1, 2),
                           lambda x: x.contiguous().view(len(x), x.shape[1], 1, -1))),
}  # fmt: skip
"""How often each kind of operation is drawn, and what makes one that fits some values."""
WEIGHTS = [weight for weight, _ in KINDS.values()]
