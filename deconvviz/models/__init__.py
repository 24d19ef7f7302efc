"""The paper's networks, layer by layer: ZFNet, the AlexNet it corrects, small ones of both, and table 3's ablations.

Each is a flat ``nn.Sequential`` whose names are the paper's (``conv1``, ``relu1``, ``pool1``, ``norm1``, ... ``fc8``),
so ``Deconvnet(zfnet()).project("pool5", 7)`` reads as the paper does. Maps of :func:`zfnet` on 224² pixels::

    conv1  7x7/2 pad 1   96 x 110²    receptive field   7, jump  2
    pool1  3x3/2         96 x 55²                      11        4     then contrast normalisation
    conv2  5x5/2        256 x 26²                      27        8
    pool2  3x3/2        256 x 13²                      43       16     then contrast normalisation
    conv3  3x3   pad 1  384 x 13²                      75       16
    conv4  3x3   pad 1  384 x 13²                     107       16
    conv5  3x3   pad 1  256 x 13²                     139       16
    pool5  3x3/2        256 x 6² = 9216               171       32     then fc6 4096, fc7 4096, fc8 classes

What the paper leaves open is ours: pools count the last, partial window (``ceil_mode``), which gives its 55 and 13;
contrast normalisation has AlexNet's constants; dropout follows fc6 and fc7; weights start as He et al. 2015, biases
at zero, seeded by ``torch.manual_seed`` as any module.

>>> model = zfnet(num_classes=101, without=("conv3", "conv4"))
>>> model.conv5, model.fc8.out_features
(Conv2d(256, 256, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)), 101)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn

from deconvviz.errors import InvalidInput

REMOVABLE = ("conv3", "conv4", "conv5", "fc6", "fc7")
"""The layers that ``without`` can name."""


class Convolution(NamedTuple):
    """A convolution, its ReLU, and what comes ``then``: ``"pool"`` (3x3/2) and ``"norm"``, in that order."""

    maps: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    then: tuple[str, ...] = ()


def zfnet(
    num_classes: int = 1000,
    without: Collection[str] = (),
    fc: int = 4096,
    conv345: Sequence[int] = (384, 384, 256),
) -> nn.Sequential:
    """ZFNet (the paper's figure 3) for images (N, 3, 224, 224), with the changes of table 3 as parameters.

    Args:
        num_classes: outputs of fc8, the logits.
        without: layers to leave out with their ReLU (and dropout), of :data:`REMOVABLE`; pool5 stays.
        fc: outputs of fc6 and of fc7.
        conv345: feature maps of conv3, conv4 and conv5; the paper's larger net has (512, 1024, 512).

    Raises:
        InvalidInput: no such layer to leave out, or a size that is no positive whole number.
    """
    convolutions = {
        "conv1": Convolution(96, 7, stride=2, padding=1, then=("pool", "norm")),
        "conv2": Convolution(256, 5, stride=2, then=("pool", "norm")),
        **_last_three(conv345),
    }
    return _network(convolutions, 224, num_classes, without, fc)


def alexnet_2012(
    num_classes: int = 1000,
    without: Collection[str] = (),
    fc: int = 4096,
    conv345: Sequence[int] = (384, 384, 256),
    groups: int = 2,
) -> nn.Sequential:
    """AlexNet as published in 2012, with contrast normalisation, for images (N, 3, 224, 224).

    conv1 11x11/4 pad 2, norm, pool; conv2 5x5 pad 2, norm, pool; conv3 to conv5 and fc6 to fc8 as :func:`zfnet`.
    ``groups=2`` splits conv2, conv4 and conv5 as between its two GPUs; ``groups=1`` connects all. Other arguments
    and errors as :func:`zfnet`. (torchvision's ``alexnet`` is the narrower one of 2014, without normalisation.)
    """
    convolutions = {
        "conv1": Convolution(96, 11, stride=4, padding=2, then=("norm", "pool")),
        "conv2": Convolution(256, 5, padding=2, groups=groups, then=("norm", "pool")),
        **_last_three(conv345, groups),
    }
    return _network(convolutions, 224, num_classes, without, fc)


def small_zfnet(
    num_classes: int = 10,
    size: int = 32,
    without: Collection[str] = (),
    fc: int = 256,
    conv345: Sequence[int] = (96, 96, 64),
) -> nn.Sequential:
    """ZFNet's shape for images (N, 3, size, size) of 32 or 64 pixels: a quarter of its maps, pool5 of 2² cells.

    conv1 5x5/2 at 32 pixels and 7x7/2 at 64, pool, norm; conv2 3x3/2, norm (at 64 pixels with a pool before);
    conv3 to conv5 on 4² cells. Arguments and errors as :func:`zfnet`.
    """
    kernel, then = _small(size, {32: (5, ("norm",)), 64: (7, ("pool", "norm"))})
    convolutions = {
        "conv1": Convolution(24, kernel, stride=2, padding=kernel // 2, then=("pool", "norm")),
        "conv2": Convolution(64, 3, stride=2, padding=1, then=then),
        **_last_three(conv345),
    }
    return _network(convolutions, size, num_classes, without, fc)


def small_alexnet(
    num_classes: int = 10,
    size: int = 32,
    without: Collection[str] = (),
    fc: int = 256,
    conv345: Sequence[int] = (96, 96, 64),
) -> nn.Sequential:
    """:func:`small_zfnet` with AlexNet's coarser start: conv1 7x7/4 at 32 pixels and 11x11/4 at 64, conv2 3x3/1.

    Only conv1 and conv2's stride differ, so from conv3 on the two have the same shapes (paper, section 4.1).
    """
    kernel, then = _small(size, {32: (7, ("norm",)), 64: (11, ("norm", "pool"))})
    convolutions = {
        "conv1": Convolution(24, kernel, stride=4, padding=kernel // 2, then=("norm", "pool")),
        "conv2": Convolution(64, 3, padding=1, then=then),
        **_last_three(conv345),
    }
    return _network(convolutions, size, num_classes, without, fc)


def _small(size: int, choices: Mapping[int, tuple[int, tuple[str, ...]]]) -> tuple[int, tuple[str, ...]]:
    if size not in choices:
        raise InvalidInput(f"size is {size!r}; expected 32 or 64 pixels: resize the images, or take zfnet (224)")
    return choices[size]


def _last_three(maps: Sequence[int], groups: int = 1) -> dict[str, Convolution]:
    """conv3 to conv5, the last with a pool; groups apply to conv4 and conv5."""
    if not isinstance(maps, Sequence) or isinstance(maps, str) or len(maps) != 3:
        raise InvalidInput(f"conv345 is {maps!r}; expected the feature maps of conv3, conv4 and conv5")
    return {
        "conv3": Convolution(maps[0], 3, padding=1),
        "conv4": Convolution(maps[1], 3, padding=1, groups=groups),
        "conv5": Convolution(maps[2], 3, padding=1, groups=groups, then=("pool",)),
    }


def _network(
    convolutions: Mapping[str, Convolution], size: int, num_classes: int, without: Collection[str], fc: int
) -> nn.Sequential:
    """Chain the layers, each taking what the last one kept gives."""
    without = without if isinstance(without, Collection) and not isinstance(without, str) else (without,)
    if unknown := [name for name in without if name not in REMOVABLE]:
        raise InvalidInput(f"without names {unknown[0]!r}; expected some of {', '.join(REMOVABLE)}")
    counts = {"num_classes": num_classes, "fc": fc}
    for name, convolution in convolutions.items():
        counts |= {f"maps of {name}": convolution.maps, f"groups of {name}": convolution.groups}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InvalidInput(f"{name} is {count!r}; expected a whole number from 1")
    model, maps = nn.Sequential(), 3
    for name, conv in convolutions.items():
        number = name[-1]
        if name not in without:
            if maps % conv.groups or conv.maps % conv.groups:
                raise InvalidInput(
                    f"groups is {conv.groups}; expected a divisor of {name}'s {maps} and {conv.maps} maps"
                )
            layer = nn.Conv2d(maps, conv.maps, conv.kernel, conv.stride, conv.padding, groups=conv.groups)
            model.add_module(name, layer)
            model.add_module(f"relu{number}", nn.ReLU(inplace=True))
            maps, size = conv.maps, (size + 2 * conv.padding - conv.kernel) // conv.stride + 1
        for kind in conv.then:
            if kind == "pool":
                model.add_module(f"pool{number}", nn.MaxPool2d(3, 2, ceil_mode=True))
                size = -((3 - size) // 2) + 1
            else:
                model.add_module(f"norm{number}", _contrast_normalisation())
    model.add_module("flatten", nn.Flatten())
    features = maps * size**2
    for number in "67":
        if f"fc{number}" not in without:
            model.add_module(f"fc{number}", nn.Linear(features, fc))
            model.add_module(f"relu{number}", nn.ReLU(inplace=True))
            model.add_module(f"drop{number}", nn.Dropout(0.5))
            features = fc
    model.add_module("fc8", nn.Linear(features, num_classes))
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
    return model


def _contrast_normalisation() -> nn.LocalResponseNorm:
    """b = a / (2 + 1e-4 Σ a²)^0.75 over 5 neighbouring maps; PyTorch divides its alpha by the 5."""
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
