"""Table 7: how well does a linear classifier tell classes apart from each layer's features?

    python examples/features_by_depth.py --data DIR --model squeezenet1_0 --weights W --layers features.2 features.12

``--data`` has one folder of pictures a class. Each layer's maps are averaged to ``--cells`` x ``--cells`` cells, scaled
to the training pictures' mean and deviation, and given to two linear classifiers, as in the paper: an SVM (one class
against the others, squared hinge) and a softmax.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pictures
import torch
from torch import Tensor, nn

from deconvviz.features import features
from deconvviz.models.zoo import load_model


def describe(model: nn.Module, loader: torch.utils.data.DataLoader, layers: list[str], cells: int) -> tuple:
    """For each layer the features (N, D) of all pictures; and their labels (N,)."""
    found, labels = [], []
    for images, target in loader:
        maps = features(model, images, layers)
        pooled = [nn.functional.adaptive_avg_pool2d(m, min(cells, *m.shape[2:])) if m.dim() == 4 else m for m in maps]
        found.append([p.flatten(1) for p in pooled])
        labels.append(target)
    return [torch.cat(parts) for parts in zip(*found, strict=True)], torch.cat(labels)


def squared_hinge(scores: Tensor, y: Tensor) -> Tensor:
    """Of each class against the others, summed over the classes; the mean over the pictures."""
    sign = 2.0 * nn.functional.one_hot(y, scores.shape[1]) - 1
    return (1 - sign * scores).clamp(min=0).square().sum(1).mean()


CLASSIFIERS = {"svm": squared_hinge, "softmax": nn.functional.cross_entropy}


def linear(kind: str, x: Tensor, y: Tensor, classes: int, c: float = 1.0) -> nn.Linear:
    """Minimise |w|²/2 + c · the classifier's loss for features (N, D) and labels (N,), by L-BFGS from zero."""
    classifier = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = classifier.weight.square().sum() / 2 + c * CLASSIFIERS[kind](classifier(x), y)
        total.backward()
        return total

    optimizer.step(loss)
    return classifier


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="one folder of pictures a class")
    add("--model", required=True, help="of torchvision, or module:factory")
    add("--weights", help="DEFAULT, or a state dict's FILE; without it the weights are random, the control")
    add("--layers", nargs="+", required=True)
    add("--per-class", type=int, default=60)
    add("--test-per-class", type=int, default=50)
    add("--size", type=int, default=224, help="side of the input in pixels")
    add("--cells", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("features_by_depth.json"))
    options = parser.parse_args(arguments)
    model = load_model(options.model, options.weights).model
    data, _ = pictures.load("folder", options.data, options.size)
    parts = pictures.split(data, options.per_class, options.test_per_class, options.seed)
    (train, y), (test, y_test) = (describe(model, pictures.batches(p), options.layers, options.cells) for p in parts)
    results: dict[str, dict[str, float]] = {}
    for layer, x, x_test in zip(options.layers, train, test, strict=True):
        mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6) * x.shape[1] ** 0.5
        results[layer] = {}
        for kind in CLASSIFIERS:
            classifier = linear(kind, (x - mean) / deviation, y, len(data.classes), c=100)
            right = classifier((x_test - mean) / deviation).argmax(1) == y_test
            results[layer][kind] = 100 * right.double().mean().item()
        found = ", ".join(f"{kind} {accuracy:.1f}%" for kind, accuracy in results[layer].items())
        print(f"{layer}: {found} of {len(y_test)} test pictures, {x.shape[1]} features", flush=True)
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
