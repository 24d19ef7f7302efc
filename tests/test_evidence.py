"""What a map does for a class: against arithmetic, a network cut by hand, and planted evidence."""

from __future__ import annotations

import pytest
import torch
from conftest import build
from test_occlusion import Packed
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from trained_like import as_if_trained, pictures

from deconvviz import Deconvnet
from deconvviz.errors import InvalidInput, LayerNotRun, TargetOutOfRange, UnknownLayer
from deconvviz.evidence import evidence


def linear_head() -> nn.Sequential:
    """Feature maps, their average, a linear layer: the effect of a map is its weight times its mean."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    ).double()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()


def test_average_and_linear_layer_by_hand(image) -> None:
    model = linear_head()
    found = evidence(model, image, "1", target=3)
    with torch.no_grad():
        maps = model[:2](image)[0]
    torch.testing.assert_close(found.activation, maps.sum((1, 2)))
    torch.testing.assert_close(found.weight, model[4].weight[3].detach())
    torch.testing.assert_close(found.effect, model[4].weight[3].detach() * maps.mean((1, 2)))
    assert found.score == pytest.approx(model(image)[0, 3].item())
    order = found.effect.argsort(descending=True).tolist()
    assert found.strongest == int(maps.sum((1, 2)).argmax())
    assert found.rank_of_strongest == 1 + order.index(found.strongest)
    positive = found.effect.clamp(min=0).sum()
    assert found.share_of_strongest == pytest.approx(float(found.effect[found.strongest] / positive))


def test_the_scores_may_come_in_a_nest(image) -> None:
    packed = Packed(linear_head(), lambda scores: {"loss": None, "logits": scores})
    found, expected = evidence(packed, image, "model.1", 3), evidence(packed.model, image, "1", 3)
    assert torch.equal(found.effect, expected.effect) and torch.equal(found.weight, expected.weight)


def test_planted_evidence(image) -> None:
    """The strongest map says nothing, a weak one everything."""
    model = linear_head()
    with torch.no_grad():
        model[0].bias[2] = 50
        model[4].weight[1] = torch.linspace(-1, -0.5, 12).double()
        model[4].weight[1, 2], model[4].weight[1, 7] = 0, 30
    found = evidence(model, image, model[1], 1)
    assert found.strongest == 2 and found.effect.argmax() == 7
    assert found.rank_of_strongest == 2 and found.share_of_strongest == pytest.approx(0, abs=1e-12)
    model[4].weight.data[1, 2] = -1
    assert evidence(model, image, "1", 1).rank_of_strongest == 12
    model[4].weight.data[1, 2] = 100
    assert evidence(model, image, "1", 1).rank_of_strongest == 1


def test_the_most_probable_class_is_the_default(image) -> None:
    model = linear_head()
    best = model(image).argmax()
    assert evidence(model, image, "1").target == evidence(model, image, "1", best).target == int(best)


def test_a_network_cut_by_hand() -> None:
    """Layers after the maps that are not linear: SqueezeNet's classifier, run on what is left."""
    model, image = build("squeezenet1_0"), pictures(1, 64, torch.float32)
    found = evidence(model, image, "features.12", 7)
    with torch.no_grad():
        maps = model.features(image)
    for fmap in (0, 9, 511):
        without = maps.clone()
        without[:, fmap] = 0
        with torch.no_grad():
            drop = model.classifier(maps) - model.classifier(without)
        torch.testing.assert_close(found.effect[fmap], drop.flatten(1)[0, 7], atol=1e-6, rtol=1e-4)
    leaf = maps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.classifier(leaf).flatten(1)[0, 7], leaf)
    torch.testing.assert_close(found.weight, gradient[0].sum((1, 2)))


def test_maps_with_a_way_round_them(image) -> None:
    """A block's inner layer: the shortcut beside it goes on as it was."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 9, 3), BasicBlock(9, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)
    model = as_if_trained(nn.Sequential(*layers).double(), pictures(4, 12))
    found = evidence(model, image, "1.bn1", 3)
    with torch.no_grad():
        start, block = model[0](image), model[1]
        for fmap in range(9):
            inner = block.bn1(block.conv1(start))
            inner[:, fmap] = 0
            end = torch.relu(start + block.bn2(block.conv2(torch.relu(inner))))
            torch.testing.assert_close(found.effect[fmap], (model(image) - model[2:](end))[0, 3])
    assert found.effect.unique().numel() == 9


def test_the_model_is_left_as_found(image) -> None:
    model = linear_head().train()
    with torch.inference_mode():
        evidence(model, image.clone(), "1", 0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_a_model_in_train_mode_is_judged_in_eval_mode(image) -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 9, 3),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
    )
    model = nn.Sequential(*layers, nn.Linear(9, 6)).double()
    expected = evidence(model.eval(), image, "2", 1)
    found = evidence(model.train(), image, "2", 1)
    assert torch.equal(found.effect, expected.effect) and torch.equal(found.weight, expected.weight)


def test_the_figure(image) -> None:
    found = evidence(linear_head(), image, "1", 2)
    (axes,) = found.figure().axes
    points = axes.collections[0].get_offsets()
    torch.testing.assert_close(torch.tensor(points), torch.stack([found.activation, found.effect], 1))
    assert f"map {found.strongest}" in "".join(text.get_text() for text in axes.texts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image": torch.zeros(2, 3, 12, 12).double()}, InvalidInput, "expected one image"),
        ({"target": 5}, TargetOutOfRange, "target is 5; expected a class from 0 to 4"),
        ({"target": -1}, TargetOutOfRange, "target is -1"),
        ({"target": "cat"}, TargetOutOfRange, "target is 'cat'"),
        ({"layer": "head"}, UnknownLayer, "no layer 'head'"),
        ({"layer": "1#2"}, LayerNotRun, "ran 1 time"),
    ],
)
def test_refusals(image, options, error, message) -> None:
    with pytest.raises(error, match=message):
        evidence(linear_head(), **({"image": image, "layer": "1"} | options))


def test_no_classifier(image) -> None:
    with pytest.raises(InvalidInput, match="expected a classifier"):
        evidence(linear_head()[:2], image, "0")


def test_a_real_network_weighs_all_its_maps(squeezenet, data) -> None:
    from deconvviz.images import load_picture, to_input

    paths = sorted((data / "imagenet_sample").iterdir())
    found = evidence(squeezenet, to_input(load_picture(paths[281]))[None], "features.12", 281)
    assert found.effect.max() > 0 > found.effect.min()
    assert found.score == pytest.approx(squeezenet(to_input(load_picture(paths[281]))[None])[0, 281].item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_totals_beyond_half_precision(image, dtype) -> None:
    """The total of map 2 is above 65504, where float16 ends; so is that of map 7, a larger one."""
    model = linear_head().float()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        model[0].bias[[2, 7]] = torch.tensor([1024.0, 1536.0])
    found = evidence(model.to(dtype), image.to(dtype), "1", 0)
    assert found.activation[[2, 7]].tolist() == [1024 * 100, 1536 * 100] and found.strongest == 7
    assert Deconvnet(model).strongest("1", inputs=image.to(dtype)).item() == 7
    found.figure().draw_without_rendering()
