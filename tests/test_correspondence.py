"""Table 1's measure: against its definition, and on a planted part that a net knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trained_like import trained_like

from deconvviz import correspondence as correspondence_module
from deconvviz.correspondence import correspondence
from deconvviz.errors import InvalidInput, UnknownLayer

SIZE, EYE = 24, 5


def planted() -> tuple[nn.Sequential, Tensor, dict[str, Tensor]]:
    """Pictures of noise with the same pattern somewhere in each, and a net with filters for it and for others.

    The strongest answer of each filter is what the net keeps, so hiding the pattern lowers the same eight features
    in every picture; hiding noise lowers whatever filter happened to be strongest there.
    """
    generator = torch.Generator().manual_seed(0)
    eye = torch.randn(3, EYE, EYE, generator=generator)
    images = 0.3 * torch.randn(6, 3, SIZE, SIZE, generator=generator)
    boxes = []
    for image in images:
        y, x = torch.randint(0, SIZE - EYE, (2,), generator=generator).tolist()
        image[:, y : y + EYE, x : x + EYE] = eye
        boxes.append((y, y + EYE, x, x + EYE))
    model = nn.Sequential(nn.Conv2d(3, 40, EYE), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.normal_(generator=generator)
        model[0].weight[:8] = eye + 0.3 * torch.randn(8, 3, EYE, EYE, generator=generator)
    return model, images, {"eye": torch.tensor(boxes)}


def test_a_shared_part_is_treated_more_alike_than_random_ones() -> None:
    model, images, boxes = planted()
    table = correspondence(model, images, boxes, ["3"], draws=20)
    eye, random = table["eye", "3"], table["random", "3"]
    assert eye.mean < 0.6 * random.mean
    assert len(eye.pairs) == 15 and len(random.pairs) == 20 * 15
    elsewhere = {"eye": boxes["eye"].roll(1, 0)}  # each picture with another's box
    assert correspondence(model, images, elsewhere, ["3"])["eye", "3"].mean > 1.3 * eye.mean


def test_the_measure_is_the_papers() -> None:
    """Δ of the definition: the sum over ordered pairs of Hamming distances, for one pair and one feature."""
    model, images, boxes = planted()
    boxes["patch"] = torch.tensor([[3, 9, 10, 14]] * 6)
    table = correspondence(model, images, boxes, ["1", model[3]], fill=0.5)
    for part in boxes:
        for layer, net in (("1", model[:2]), ("3", model)):
            hidden = images.clone()
            for n, (y0, y1, x0, x1) in enumerate(boxes[part].tolist()):
                hidden[n, :, y0:y1, x0:x1] = 0.5
            with torch.no_grad():
                signs = np.sign((net(images) - net(hidden)).flatten(1).numpy())
            total = sum((signs[i] != signs[j]).sum() for i in range(6) for j in range(6) if i != j)
            assert table[part, layer].mean == pytest.approx(total / 30 / signs.shape[1], rel=1e-9)
            pairs = [(signs[i], signs[j]) for i in range(6) for j in range(i + 1, 6)]
            moved = [(a != 0) | (b != 0) for a, b in pairs]
            among = [(a != b)[m].mean() if m.any() else 0 for (a, b), m in zip(pairs, moved, strict=True)]
            assert table[part, layer].mean_among_moved == pytest.approx(np.mean(among), rel=1e-9)
    assert [(row.part, row.layer) for row in table.rows] == [
        (part, layer) for part in ("eye", "patch", "random") for layer in ("1", "3")
    ]


def test_a_box_can_be_filled_with_the_mean_or_any_function() -> None:
    model, images, boxes = planted()

    def flip(x: Tensor) -> Tensor:
        return x.flip(3)

    for fill, cover in (("mean", lambda x: x.mean((2, 3), keepdim=True)), (flip, flip)):
        hidden = images.clone()
        for n, (y0, y1, x0, x1) in enumerate(boxes["eye"].tolist()):
            hidden[n, :, y0:y1, x0:x1] = cover(images).expand_as(images)[n, :, y0:y1, x0:x1]
        with torch.no_grad():
            signs = (model(images) - model(hidden)).sign()
        pairs = [(signs[i] != signs[j]).double().mean() for i in range(6) for j in range(i + 1, 6)]
        found = correspondence(model, images, boxes, "3", fill=fill)["eye", "3"]
        torch.testing.assert_close(found.pairs, torch.stack(pairs))


def test_equal_pictures_are_treated_alike() -> None:
    model, images, _ = planted()
    box = {"same": [(2, 7, 3, 8)] * 2}
    assert correspondence(model, images[:1].repeat(2, 1, 1, 1), box, ["1"])["same", "1"].mean == 0


def test_boxes_that_hide_nothing() -> None:
    model, images, boxes = planted()
    row = correspondence(model, images * 0 + 0.5, boxes, ["1"], fill=0.5)["eye", "1"]
    assert row.mean == row.mean_among_moved == 0 and not row.moved.any()


def test_a_plain_background_does_not_look_alike_among_the_moved() -> None:
    """Boxes that touch only a corner move less, so Δ falls, though what they move is treated no more alike."""
    model, images, _ = planted()
    whole = [(0, SIZE, 0, SIZE)] * 6
    corner = [(0, 6, 0, 6)] * 6
    table = correspondence(model, images, {"whole": whole, "corner": corner}, ["1"])
    assert table["corner", "1"].mean < 0.3 * table["whole", "1"].mean
    assert table["corner", "1"].mean_among_moved > table["whole", "1"].mean_among_moved


def test_the_draws_are_seeded_and_of_the_parts_sizes(monkeypatch) -> None:
    model, images, _ = planted()
    boxes = {"tall": torch.tensor([[0, 20, 0, 2]] * 6), "wide": torch.tensor([[0, 3, 0, 24]] * 6)}
    drawn = []
    occluded = correspondence_module._occluded
    monkeypatch.setattr(
        correspondence_module,
        "_occluded",
        lambda x, b, fill: (drawn.append(b.clone()), occluded(x, b, fill))[1],
    )
    first = correspondence(model, images, boxes, ["3"], draws=40, seed=3)
    sizes = [torch.stack([b[:, 1] - b[:, 0], b[:, 3] - b[:, 2]], 1) for b in drawn[2:]]
    assert all((s == torch.tensor([[20, 2], [3, 24]][i % 2])).all() for i, s in enumerate(sizes))
    random = torch.cat(drawn[2:])
    assert (random >= 0).all() and (random <= SIZE).all()
    assert {0, 4} <= set(random[: 6 * 40, 0][random[:, 1] - random[:, 0] == 20].tolist())  # up to both borders
    again = correspondence(model, images, boxes, ["3"], draws=40, seed=3)
    other = correspondence(model, images, boxes, ["3"], draws=40, seed=4)
    assert torch.equal(first["random", "3"].pairs, again["random", "3"].pairs)
    assert not torch.equal(first["random", "3"].pairs, other["random", "3"].pairs)


def test_the_table_prints_and_the_inputs_stay() -> None:
    model, images, boxes = planted()
    before = images.clone()
    table = correspondence(model, images, boxes, ["1", "3"])
    lines = str(table).splitlines()
    assert lines[0].split() == ["occluded", "1", "3"]
    eye = table["eye", "3"]
    assert lines[1].startswith("eye") and lines[1].endswith(
        f"{eye.mean:.3f} ± {eye.std:.3f} ({eye.mean_among_moved:.3f})"
    )
    assert torch.equal(images, before)


def test_a_torchvision_model() -> None:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    table = correspondence(
        trained_like("googlenet", torch.float32),
        images,
        {"a": [(0, 32, 0, 32)] * 3},
        ["inception4a", "fc"],
        draws=1,
    )
    assert all(0 < row.mean < 1 for row in table.rows)


@pytest.mark.parametrize(
    ("boxes", "options", "error", "message"),
    [
        ({}, {}, InvalidInput, r"parts \[\]"),
        ({"random": [(0, 2, 0, 2)] * 6}, {}, InvalidInput, "none of them called 'random'"),
        ({"eye": [(0, 2, 0, 2)] * 5}, {}, InvalidInput, r"shape \(5, 4\); expected \(6, 4\)"),
        ({"eye": [(0.0, 2.0, 0.0, 2.0)] * 6}, {}, InvalidInput, "torch.float32 of shape"),
        ({"eye": "left"}, {}, InvalidInput, "the boxes of 'eye' are 'left'"),
        ({"eye": [(0, 2, 0, 2)] * 5 + [(4, 4, 0, 2)]}, {}, InvalidInput, r"in image 5 is \[4, 4, 0, 2\]"),
        ({"eye": [(0, 25, 0, 2)] * 6}, {}, InvalidInput, "y1 <= 24"),
        (None, {"draws": 0}, InvalidInput, "draws is 0"),
        (None, {"layers": ["head"]}, UnknownLayer, "no layer 'head'"),
        (None, {"layers": []}, InvalidInput, r"layers is \[\]"),
        (None, {"draws": 2.5}, InvalidInput, "draws is 2.5"),
        (None, {"seed": "a"}, InvalidInput, "seed is 'a'"),
        (None, {"fill": "black"}, InvalidInput, "the fill is 'black'; expected a number"),
        ([(0, 2, 0, 2)], {}, InvalidInput, "boxes is a list"),
    ],
)
def test_refusals(boxes, options, error, message) -> None:
    model, images, planted_boxes = planted()
    with pytest.raises(error, match=message):
        correspondence(model, images, planted_boxes if boxes is None else boxes, **({"layers": ["3"]} | options))


def test_one_picture_and_an_unknown_row() -> None:
    model, images, boxes = planted()
    with pytest.raises(InvalidInput, match="1 images"):
        correspondence(model, images[:1], {"eye": boxes["eye"][:1]}, ["3"])
    with pytest.raises(InvalidInput, match=r"no row \('nose', '3'\); expected \(part, layer\)"):
        correspondence(model, images, boxes, ["3"])["nose", "3"]


def test_a_box_hides_its_part_in_every_frame_of_a_clip() -> None:
    clips = torch.randn(2, 3, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    table = correspondence(nn.Flatten(), clips, {"corner": [(0, 3, 10, 16)] * 2}, [""])
    assert table["corner", ""].moved.item() == pytest.approx(3 * 6 / (12 * 16))
    assert table["random", ""].moved.max() < 0.25
    with pytest.raises(InvalidInput, match=r"images have shape \(2, 3, 16\); expected \(N, C, H, W\), or clips"):
        correspondence(nn.Flatten(), clips[:, :, 0, 0], {"start": [(0, 3, 0, 3)] * 2}, [""])


def test_a_model_in_train_mode_is_judged_in_eval_mode() -> None:
    model, images, boxes = planted()
    model.append(nn.BatchNorm1d(40)).append(nn.Dropout())
    expected, found = (str(correspondence(model.train(mode), images, boxes, ["5"])) for mode in (False, True))
    assert found == expected and all(m.training for m in model.modules())
