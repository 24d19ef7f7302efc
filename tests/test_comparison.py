"""One unit by every method: each column against its own definition."""

import pytest
import torch
from conftest import build
from dense_jacobian import Applied
from torch import nn

from deconvviz import Deconvnet
from deconvviz.comparison import compare, shuffled_weights
from deconvviz.errors import InvalidInput, UnsupportedOperation

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.sin(self.conv(x))


def test_every_column_shows_the_same_unit():
    """Saliency and guided backprop by autograd, with the rectifiers' backward written out here."""
    model = build("squeezenet1_1")
    found = compare(model, IMAGE, "features.7", 5)
    activation = model.features[:8](IMAGE)[0, 5]
    assert activation[found.position] == activation.max() > 0

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(context, signal):
            (x,) = context.saved_tensors
            return signal.relu() * (x > 0)

    class Relu(nn.Module):
        def forward(self, x):
            return Guided.apply(x)

    guided = shuffled_weights(model)
    guided.load_state_dict(model.state_dict())
    for module in list(guided.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Relu())
    for network, column in ((model, found.saliency), (guided, found.guided_backprop)):
        image = IMAGE.clone().requires_grad_()
        unit = network.features[:8](image)[(0, 5, *found.position)]
        (gradient,) = torch.autograd.grad(unit, image)
        expected = gradient[0].abs() if network is model else gradient[0]
        assert (column - expected).abs().max() <= 1e-5 * expected.abs().max()

    place = {"position": found.position, "seed": "one", "inputs": IMAGE}
    assert torch.equal(found.deconvnet, Deconvnet(model).project("features.7", 5, **place)[0])
    shuffled = shuffled_weights(model)
    assert torch.equal(found.randomized, Deconvnet(shuffled).project("features.7", 5, **place)[0])
    assert not torch.allclose(found.randomized, found.deconvnet)


def test_shuffled_weights_are_the_same_values_elsewhere():
    model = build("squeezenet1_1")
    before = [parameter.clone() for parameter in model.parameters()]
    shuffled = shuffled_weights(model)
    for ours, theirs, same in zip(model.parameters(), shuffled.parameters(), before, strict=True):
        assert torch.equal(ours, same)
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)
        assert ours.dim() == 1 or (ours != theirs).float().mean() > 0.9


def test_only_the_last_call_can_be_compared():
    model, layer = build("resnet18"), "layer1.0.relu#2"
    found = compare(model, IMAGE, layer, 3)
    assert found.label == "layer1.0.relu#2 map 3"
    assert torch.equal(found.deconvnet, Deconvnet(model).project(layer, 3, inputs=IMAGE, seed="one")[0])
    with pytest.raises(InvalidInput, match="not the last call, 'layer1.0.relu#2'"):
        compare(model, IMAGE, "layer1.0.relu#1", 3)


def test_what_is_unsupported_is_an_error_unless_the_gradient_is_asked_for():
    with pytest.raises(UnsupportedOperation):
        compare(Sine(), IMAGE, "", 1)
    found = compare(Sine(), IMAGE, "", 1, on_unsupported="gradient")
    assert (found.deconvnet.abs() - found.saliency).abs().max() < 1e-6


def test_one_image_at_a_time():
    with pytest.raises(InvalidInput, match="expected one image"):
        compare(build("squeezenet1_1"), IMAGE.expand(2, -1, -1, -1), "features.7", 5)


def test_a_layer_that_takes_parts_of_the_image_as_several():
    model = nn.Sequential(nn.Unflatten(3, (2, 8)), Applied(lambda x: x.movedim(3, 1).flatten(0, 1)), nn.Conv2d(3, 4, 3))
    with pytest.raises(InvalidInput, match="layer '2' gives 2 rows of feature maps for one image"):
        compare(model, torch.rand(1, 3, 16, 16), "2", 1)


@pytest.mark.parametrize("fmap", [[1, 2], None, "strongest", 1.5])
def test_one_map_at_a_time(fmap):
    with pytest.raises(InvalidInput, match="expected the number of one feature map"):
        compare(build("squeezenet1_1"), IMAGE, "features.7", fmap)


def test_a_picture_that_is_no_tensor():
    with pytest.raises(InvalidInput, match="ndarray"):
        compare(build("squeezenet1_1"), IMAGE.numpy(), "features.7", 1)
