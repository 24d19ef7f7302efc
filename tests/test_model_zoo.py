"""Models by name: what is built, what its weights come with, and what is said when they do not fit."""

import sys

import pytest
import torch
import torchvision
from conftest import build
from PIL import Image
from torchvision.models import get_model_weights

from deconvviz.errors import InvalidInput, WeightsError
from deconvviz.models.weights_file import load_weights
from deconvviz.models.zoo import load_model

NAME = "squeezenet1_1"


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no network here")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A function that writes ``nets.py`` into the current folder and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield (tmp_path / "nets.py").write_text
    sys.modules.pop("nets", None)


def saved(tmp_path, state, name="weights.pth"):
    torch.save(state, tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", [NAME, "inception_v3", "efficientnet_b0"])
def test_a_picture_is_prepared_as_torchvision_prepares_it(name):
    preset = next(iter(get_model_weights(name))).transforms()
    picture = Image.effect_noise((400, 350), 60).convert("RGB")
    assert torch.equal(load_model(name).transform(picture), preset(picture))


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [("fcn_resnet50", 520, 0.485), ("r3d_18", 112, 0.43216), ("ssd300_vgg16", 256, 0.0)],
)
def test_other_families_are_built_without_a_download_and_prepared_by_their_presets(name, size, mean):
    loaded = load_model(name)
    assert (loaded.transform.size, loaded.transform.mean[0]) == (size, mean)
    assert not loaded.model.training


def test_random_weights_are_seeded_named_as_such_and_leave_the_seed_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = load_model(NAME), load_model(NAME)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.model.features[0].weight, second.model.features[0].weight)
    assert (first.learned, first.categories) == (False, None)


@pytest.mark.parametrize("wrap", ["{}", "state_dict", "model_state_dict", "model", "module.", "_orig_mod.", "model."])
def test_a_state_dict_is_found_in_its_wrapping(tmp_path, wrap):
    state = build(NAME, seed=1).state_dict()
    prefixed = {f"{wrap if wrap.endswith('.') else 'module.'}{key}": tensor for key, tensor in state.items()}
    content = state if wrap == "{}" else prefixed if wrap.endswith(".") else {wrap: prefixed, "epoch": 3}
    loaded = load_model(NAME, saved(tmp_path, content))
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.model.state_dict().items())
    assert loaded.learned
    assert loaded.categories[967] == "espresso"


def test_only_a_prefix_of_all_names_is_stripped(tmp_path):
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    load_weights(model, tmp_path / saved(tmp_path, model.state_dict()))
    wrapped = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2)})  # whose own names begin so
    load_weights(wrapped, tmp_path / saved(tmp_path, wrapped.state_dict()))


def test_a_number_has_no_classes(tmp_path):
    model = torch.nn.PReLU()
    with pytest.raises(WeightsError, match=r"another shape: weight \(\), not \(1,\)"):
        load_weights(model, tmp_path / saved(tmp_path, {"weight": torch.tensor(0.25)}))


def altered(**changes):
    state = dict(build(NAME).state_dict())
    for key, tensor in changes.items():
        del state[key.replace("__", ".")]
        state |= tensor
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            altered(classifier__1__bias={"classifier.1.bias": torch.zeros(10)})
            | {"classifier.1.weight": torch.zeros(10, 512, 1, 1)},
            "10 classes, the model 1000",
        ),
        (altered(features__0__bias={}), "missing: features.0.bias$"),
        (altered() | {f"extra{i}": torch.zeros(1) for i in range(9)}, "unexpected: extra0.*and 6 more$"),
        (
            altered(features__0__weight={"features.0.weight": torch.zeros(64, 1, 3, 3)}),
            r"another shape: features.0.weight \(64, 1, 3, 3\), not \(64, 3, 3, 3\)",
        ),
        ({"epoch": 3}, "no state dict"),
        ([torch.zeros(1)], "no state dict"),
        ({}, "no state dict"),
        (torch.nn.ReLU(), "not a file of tensors alone"),
    ],
    ids=["classes", "missing", "unexpected", "shape", "numbers", "list", "empty", "module"],
)
def test_weights_that_do_not_fit(tmp_path, content, message):
    with pytest.raises(WeightsError, match=message):
        load_model(NAME, saved(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut short"])
def test_damaged_weights(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="not a file of tensors alone"):
        load_model(NAME, str(tmp_path / "w.pth"))


def test_the_heads_for_training_may_lack(tmp_path):
    state = build("googlenet").state_dict()
    lean = {key: tensor for key, tensor in state.items() if not key.startswith("aux")}
    model = load_model("googlenet", saved(tmp_path, lean)).model
    assert torch.equal(model.conv1.conv.weight, state["conv1.conv.weight"])
    assert not model.transform_input


def test_published_weights_are_known_by_their_files_name(tmp_path):
    url = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.url
    path = saved(tmp_path, build("googlenet").state_dict(), url.rpartition("/")[2])
    assert load_model("googlenet", path).model.transform_input


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_a_failed_download_says_what_to_fetch(weights):
    with pytest.raises(WeightsError, match=r"no network here.*fetch https://\S+squeezenet1_1-\w+.pth"):
        load_model(NAME, weights)


def test_published_weights_come_with_their_recipe(monkeypatch):
    state = build(NAME, seed=1).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
    loaded = load_model(NAME, "DEFAULT")
    assert torch.equal(loaded.model.features[0].weight, state["features.0.weight"])
    assert len(loaded.categories) == 1000
    assert loaded.learned


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet81", None, "did you mean .*resnet18"),
        ("", None, "did you mean"),
        ("nets/mine.py", None, "a file; expected nets/mine.py:factory"),
        (NAME, "IMAGENET1K_V7", "no file, nor torchvision's for squeezenet1_1 .*IMAGENET1K_V1"),
        (NAME, "absent/weights.pth", "no file, nor"),
    ],
)
def test_unknown_names(name, weights, message):
    with pytest.raises((InvalidInput, WeightsError), match=message):
        load_model(name, weights)


def test_a_factory_of_the_current_folder(factory, tmp_path):
    factory("from torch import nn\ndef tiny(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())\n")
    state = {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.zeros(4)}
    loaded = load_model("nets:tiny", saved(tmp_path, state))
    assert torch.equal(loaded.model[0].weight, state["0.weight"])
    assert not loaded.model.training
    assert loaded.learned


@pytest.mark.parametrize("absolute", [False, True])
def test_a_factory_of_a_file(factory, tmp_path, monkeypatch, absolute):
    factory("from torch import nn\ndef tiny(): return nn.Conv2d(3, 4, 3)\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "nets.py" if absolute else "../nets.py"
    assert load_model(f"{file}:tiny").model.out_channels == 4


def test_a_module_needs_no_factory(factory):
    factory("from torch import nn\nnet = nn.Conv2d(3, 4, 3)\n")
    assert load_model("nets:net").model.out_channels == 4


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "AttributeError.*tiny"),
        ("tiny = 3", "TypeError.*not callable"),
        ("tiny = dict", "gives a dict; expected an nn.Module"),
        ("\ndef tiny(): return 1 / 0", r"ZeroDivisionError.*\(nets.py, line 2\)"),
        ("tiny = (", "SyntaxError"),
        ("import absent_package", r"ModuleNotFoundError.*\(nets.py, line 1\)"),
    ],
)
def test_a_factory_that_fails_is_told_with_its_line(factory, code, message):
    factory(code)
    with pytest.raises(InvalidInput, match=message):
        load_model("nets:tiny")


@pytest.mark.parametrize("name", ["absent_module:tiny", ":tiny", "nets:"])
def test_a_factory_that_is_not_there(factory, name):
    factory("")
    with pytest.raises(InvalidInput, match="expected module:factory"):
        load_model(name)
