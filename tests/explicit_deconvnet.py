"""The deconvnet of Zeiler & Fergus, section 2.1, written out layer by layer for networks without branches.

Forward, each layer's output is kept, and for each max pool where the maximum of every window fell. Back, one
map of one image at a time: unpool by those places, rectify, apply the transposed filters without bias. All
pooling is done window by window in Python; nothing here uses the package, hooks or autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Layer:
    """One layer of a forward pass: what went in and came out, and for a max pool the places of the maxima."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    places: Tensor | None = None


class ExplicitDeconvnet:
    """A forward pass through ``model`` (AlexNet, VGG or a sequence), and the way back to the pixels.

    ``unpooling`` is ``"sum"`` or ``"overwrite"`` where windows chose the same input (the last window in
    row-major order wins), or ``"MaxUnpool2d"``: whatever PyTorch's layer does.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, images: Tensor, unpooling: str = "sum") -> None:
        self.unpooling = unpooling
        self.layers: list[Layer] = []
        for name, module in in_order(model):
            places = None
            if isinstance(module, nn.MaxPool2d):
                output, places = max_pool(images, module)
            else:
                output = module(images.clone())  # a ReLU in place would overwrite the layer before
            self.layers.append(Layer(name, module, images, output, places))
            images = output

    def activation(self, name: str) -> Tensor:
        """The output (N, C, ...) of a layer."""
        return next(layer.output for layer in self.layers if layer.name == name)

    @torch.no_grad()
    def project(self, name: str, maps: list[list[int]], position: object, seed: str) -> Tensor:
        """Maps ``maps[n]`` of every image n back to pixels: (N, M, C, H, W)."""
        columns = [
            self.back(name, self.seed(self.activation(name), column, position, seed))
            for column in zip(*maps, strict=True)
        ]
        return torch.stack(columns, 1)

    def seed(self, activation: Tensor, maps: tuple[int, ...], position: object, seed: str) -> Tensor:
        """The activation with every unit but the chosen ones of map ``maps[n]`` of image n set to zero."""
        signal = torch.zeros_like(activation)
        for n, m in enumerate(maps):
            plane = activation[n, m]
            units = list(itertools.product(*map(range, plane.shape)))
            if isinstance(position, Tensor):
                units = [tuple(position[n].tolist())]
            elif position == "max":
                values = plane.flatten().tolist()
                units = [units[values.index(max(values))]]
            elif position != "all":
                units = [position]
            for unit in units:
                signal[(n, m, *unit)] = 1 if seed == "one" else plane[unit]
        return signal

    def back(self, name: str, signal: Tensor) -> Tensor:
        """A signal at the output of layer ``name`` to the pixels."""
        names = [layer.name for layer in self.layers]
        for layer in reversed(self.layers[: names.index(name) + 1]):
            signal = self.through(layer, signal)
        return signal

    def through(self, layer: Layer, signal: Tensor) -> Tensor:
        """A signal at a layer's output to its input."""
        module, shape = layer.module, layer.input.shape
        match module:
            case nn.Conv2d():
                return transposed_filters(signal, module, shape)
            case nn.Linear():
                return signal @ module.weight
            case nn.ReLU():
                return signal.clamp(min=0)
            case nn.BatchNorm2d():
                scale = module.weight / (module.running_var + module.eps).sqrt()
                return signal * scale[None, :, None, None]
            case nn.MaxPool2d():
                return unpool(signal, layer, self.unpooling)
            case nn.AdaptiveAvgPool2d():
                return spread(signal, shape)
            case nn.Flatten():
                return signal.reshape(shape)
            case nn.Dropout() | nn.LocalResponseNorm():
                return signal
        raise NotImplementedError(module)


def in_order(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of an AlexNet, VGG or sequence, named as in the model; its flattening has no name."""
    if isinstance(model, nn.Sequential):
        yield from model.named_children()
        return
    yield from ((f"features.{name}", layer) for name, layer in model.features.named_children())
    yield "avgpool", model.avgpool
    yield "", nn.Flatten()
    yield from ((f"classifier.{name}", layer) for name, layer in model.classifier.named_children())


def windows(pool: nn.MaxPool2d, height: int, width: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Every cell (y, x) of a max pool's output in row-major order, and the rows and columns of its window."""

    def along(size: int) -> list[slice]:
        kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
        whole = (size + 2 * padding - kernel) / stride
        count = (math.ceil(whole) if pool.ceil_mode else math.floor(whole)) + 1
        starts = [cell * stride - padding for cell in range(count)]
        return [slice(max(start, 0), min(start + kernel, size)) for start in starts if start < size]

    for y, rows in enumerate(along(height)):
        for x, columns in enumerate(along(width)):
            yield y, x, rows, columns


def max_pool(input: Tensor, pool: nn.MaxPool2d) -> tuple[Tensor, Tensor]:
    """The maxima (N, C, h, w) and their places, as indices into the flat (H * W) input."""
    height, width = input.shape[-2:]
    cells = list(windows(pool, height, width))
    output = input.new_empty(*input.shape[:2], cells[-1][0] + 1, cells[-1][1] + 1)
    places = torch.empty_like(output, dtype=torch.long)
    for y, x, rows, columns in cells:
        window = input[:, :, rows, columns].flatten(2)
        output[:, :, y, x], first = window.max(-1).values, window.argmax(-1)
        across = columns.stop - columns.start
        places[:, :, y, x] = (rows.start + first // across) * width + columns.start + first % across
    return output, places


def unpool(signal: Tensor, layer: Layer, unpooling: str) -> Tensor:
    """Every value of the signal to the place of its window's maximum."""
    if unpooling == "MaxUnpool2d":
        unpooling_layer = nn.MaxUnpool2d(layer.module.kernel_size, layer.module.stride, layer.module.padding)
        return unpooling_layer(signal, layer.places, output_size=layer.input.shape)
    out = torch.zeros_like(layer.input).flatten(2).flatten(0, 1)
    places, values = (item.flatten(2).flatten(0, 1) for item in (layer.places, signal))
    every = torch.arange(len(out))
    for cell in range(places.shape[1]):
        before = 0 if unpooling == "overwrite" else out[every, places[:, cell]]
        out[every, places[:, cell]] = before + values[:, cell]
    return out.view_as(layer.input)


def transposed_filters(signal: Tensor, conv: nn.Conv2d, shape: torch.Size) -> Tensor:
    """The transposed convolution without bias; rows and columns that no filter reached get zero."""
    rest = [
        size - ((cells - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for size, cells, stride, padding, dilation, kernel in zip(
            shape[2:],
            signal.shape[2:],
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.kernel_size,
            strict=True,
        )
    ]
    return F.conv_transpose2d(signal, conv.weight, None, conv.stride, conv.padding, rest, conv.groups, conv.dilation)


def spread(signal: Tensor, shape: torch.Size) -> Tensor:
    """Every value of an adaptive average pool's output, shared out evenly over its window."""
    out = signal.new_zeros(shape)
    height, width = signal.shape[-2:]
    for y in range(height):
        rows = slice(y * shape[2] // height, math.ceil((y + 1) * shape[2] / height))
        for x in range(width):
            columns = slice(x * shape[3] // width, math.ceil((x + 1) * shape[3] / width))
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            out[:, :, rows, columns] += signal[:, :, y : y + 1, x : x + 1] / area
    return out
