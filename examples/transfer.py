"""Tables 4 and 5: how much does a trained network help on other pictures, and how few of them are enough?

    python examples/transfer.py --dataset caltech101 --data DIR --model resnet18 --weights DEFAULT --per-class 15 30
    python examples/transfer.py --dataset caltech101 --data DIR --model resnet18 --scratch --per-class 15 30
    python examples/transfer.py --dataset voc2012    --data DIR --model resnet18 --weights DEFAULT

The model gets a new head for the data's classes and is trained as a whole, or with ``--frozen`` its head alone, as in
the paper. ``--download`` has torchvision fetch the data; ``--dataset folder`` takes any folder with one folder a class.
Printed: accuracy in percent on (training, test) pictures after the first and the best epoch; for VOC the mean of the
classes' average precisions, and then each class's. Every epoch's are kept in ``--out``, and the state after the last
one, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pictures
import torch
from checkpoint import Checkpoint, network
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from deconvviz.errors import InvalidInput
from deconvviz.models.zoo import load_model


def new_head(model: nn.Module, classes: int) -> nn.Module:
    """Replace the last linear layer or convolution by one with an output a class; returned."""
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    if isinstance(last, nn.Linear):
        head: nn.Module = nn.Linear(last.in_features, classes)
    else:
        head = nn.Conv2d(last.in_channels, classes, last.kernel_size)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)
    return head


def average_precision(scores: Tensor, present: Tensor) -> float:
    """The area under precision over recall (VOC's since 2010) for the scores (N,) of a class that is present or not."""
    hits = present[scores.argsort(descending=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    return float((best_from_here * hits).sum() / hits.sum())


def average_precisions(scores: Tensor, labels: Tensor) -> dict[int, float]:
    """Of each of K classes that occurs in the labels (N, K), in percent."""
    occur = labels.any(0).nonzero().flatten().tolist()
    return {k: 100 * average_precision(scores[:, k], labels[:, k]) for k in occur}


def quality(scores: Tensor, labels: Tensor) -> float:
    """Accuracy, or for labels (N, K) the mean of the classes' average precisions; in percent."""
    if labels.dim() == 1:
        return 100 * (scores.argmax(1) == labels).double().mean().item()
    found = average_precisions(scores, labels)
    return sum(found.values()) / len(found)


def run(model: nn.Module, loader: DataLoader, device: str, optimizer=None) -> tuple[Tensor, Tensor]:
    """One pass over the pictures, training if there is an optimizer: the scores given on the way, and the labels."""
    model.train(optimizer is not None)
    for module in model.modules():  # the statistics of frozen layers stay as they are
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()
    scores, labels = [], []
    for images, target in loader:
        with torch.set_grad_enabled(optimizer is not None):
            output = model(images.to(device))
            output = getattr(output, "logits", output)  # GoogLeNet and Inception train with more heads
        if optimizer is not None:
            target = target.to(device)
            loss = nn.functional.cross_entropy if target.dim() == 1 else nn.functional.binary_cross_entropy_with_logits
            optimizer.zero_grad()
            loss(output, target).backward()
            optimizer.step()
        scores.append(output.detach().cpu())
        labels.append(target.cpu())
    return torch.cat(scores), torch.cat(labels)


def start(options: argparse.Namespace, classes: int, seed: int) -> nn.Module:
    """The model with a new head; with ``--frozen`` the head alone can learn."""
    torch.manual_seed(seed)
    model = load_model(options.model, None if options.scratch else options.weights).model
    head = new_head(model, classes)
    if options.frozen:
        model.requires_grad_(False)
        head.requires_grad_(True)
    return model


def train(
    model: nn.Module, data: tuple[Dataset, Dataset], options: argparse.Namespace, checkpoint: Checkpoint
) -> list[dict[str, Any]]:
    """The quality after each epoch; goes on from the checkpoint if there is one."""
    model.to(options.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.lr)
    history: list[dict[str, Any]] = []
    if (kept := checkpoint.load()) is not None:
        history = kept["history"]
        if "model" in kept:  # not where the training is finished
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
    for epoch in range(len(history), options.epochs):
        torch.manual_seed(options.seed + 1000 * epoch)  # the same order and dropout, interrupted or not
        training = run(model, pictures.batches(data[0], options.batch, seed=epoch), options.device, optimizer)
        test = run(model, pictures.batches(data[1], 64), options.device)
        history.append({"training": quality(*training), "test": quality(*test)})
        if test[1].dim() == 2:
            found = average_precisions(*test)
            history[-1]["average precisions"] = {data[1].classes[k]: value for k, value in found.items()}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save({"history": history} | (state if epoch + 1 < options.epochs else {}))
    return history


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset", required=True, choices=("caltech101", "caltech256", "voc2012", "folder"))
    add("--data", type=Path, required=True, help="where torchvision keeps the data, or the folder")
    add("--download", action="store_true")
    add("--model", default="resnet18", help="of torchvision, or module:factory")
    add("--weights", help="DEFAULT or another of torchvision's, or a state dict's FILE")
    add("--scratch", action="store_true", help="start from random weights")
    add("--frozen", action="store_true", help="train the new head only")
    add("--per-class", type=int, nargs="+", help="training pictures a class; default: four of five")
    add("--test-per-class", type=int, default=50)
    add("--epochs", type=int, default=10)
    add("--lr", type=float, default=0.0001, help="of AdamW; from scratch 0.001 suits")
    add("--batch", type=int, default=32)
    add("--size", type=int, default=224, help="side of the input in pixels")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("transfer"), help="folder")
    options = parser.parse_args(arguments)
    if options.scratch == (options.weights is not None):
        raise InvalidInput("expected --weights or --scratch, and not both")
    if min(options.epochs, options.batch, options.size, options.test_per_class, *(options.per_class or [1])) < 1:
        raise InvalidInput("--epochs, --batch, --size, --per-class and --test-per-class are counts; expected 1 or more")
    data, own_test = pictures.load(options.dataset, options.data, options.size, options.download)
    if own_test and options.per_class:
        raise InvalidInput(f"{options.dataset} has its own training part; expected no --per-class")
    settings = ("size", "batch", "lr", "epochs", "seed", "frozen", "test_per_class")
    about = {"model": options.model, "data": data.describe()} | {name: vars(options)[name] for name in settings}
    for per_class in options.per_class or [None]:
        kind = ("scratch" if options.scratch else "pretrained") + (" frozen" if options.frozen else "")
        name = f"{options.dataset} {options.model} {kind} {per_class or 'all'} a class, seed {options.seed}"
        parts = (data, own_test) if own_test else pictures.split(data, per_class, options.test_per_class, options.seed)
        model = start(options, len(data.classes), options.seed)
        path = options.out / (name.replace(" ", "_").replace(":", "_") + ".pth")
        checkpoint = Checkpoint(path, about | network(model))
        history = train(model, parts, options, checkpoint)
        best = max(range(len(history)), key=lambda epoch: history[epoch]["test"])
        first, last = ("({training:.2f}, {test:.2f})".format(**history[epoch]) for epoch in (0, best))
        print(f"{name}: {first} -> {last}, epoch {best + 1}", flush=True)
        for kind, precision in history[best].get("average precisions", {}).items():
            print(f"  {kind}: {precision:.2f}")
        path.with_suffix(".json").write_text(json.dumps(history))


if __name__ == "__main__":
    main()
