"""A sweep of a patch over one picture: OcclusionSensitivity against captum's and against plain batching.

captum and plain batching take the same time for every window, so they are timed on some windows, at each of
several batch sizes, and the best one is scaled to the sweep; ours is timed on all of it, everything included.
The FLOP limit is the multiply-adds of whole passes over those of what changes, window by window.

    python benchmarks/occlusion.py [--models resnet18,vgg16] [--patches 32,16] [--all]
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch
import torchvision
from captum.attr import Occlusion
from measure import machine, side_by_side

from deconvviz import OcclusionSensitivity
from deconvviz.errors import UnsupportedModel
from deconvviz.incremental import Plan
from deconvviz.occlusion.clean_passes import clean_passes
from deconvviz.occlusion.windows import Windows

MODELS = [
    "vgg16",
    "squeezenet1_0",
    "resnet18",
    "mobilenet_v2",
    "inception_v3",
    "resnet50",
    "alexnet",
    "densenet121",
]
STRIDE = 8
BATCHES = (1, 8, 32, 64)
RUNS = 3
FAST = 32
"""Windows that the others are timed on; a quarter of them one at a time by plain passes."""


def setting(name: str):
    """The model and a picture."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    side = 299 if name == "inception_v3" else 224
    return model, torch.randn(1, 3, side, side)


def flop_limit(model, image, windows: Windows) -> float | None:
    """Whole multiply-adds over incremental ones, each window by itself."""
    try:
        (clean,), _, _ = clean_passes(model, image)
    except UnsupportedModel:
        return None
    some = np.random.default_rng(0).permutation(len(windows))[:100]
    plans = [Plan(clean, windows.firsts[:, [w]], windows.size) for w in some]
    return plans[0].whole_cost / float(np.mean([plan.cost for plan in plans]))


def compare(name: str, patch: int) -> dict[str, float]:
    """Seconds a sweep by each, the best batch size of each found first."""
    model, image = setting(name)
    side = image.shape[-1]
    windows = Windows.sliding((3, side, side), (3, patch, patch), (3, STRIDE, STRIDE))
    count = len(windows)
    step = max(1, int(np.ceil((side - patch) / (np.sqrt(FAST) - 1))))
    some = len(Windows.sliding((3, side, side), (3, patch, patch), (3, min(step, patch), min(step, patch))))

    def captum(batch):
        arguments = ((3, patch, patch), (3, min(step, patch), min(step, patch)))
        Occlusion(model).attribute(image, *arguments, target=0, perturbations_per_eval=batch)

    def plain(batch, layout):
        images = image.repeat(batch, 1, 1, 1).contiguous(memory_format=layout)
        with torch.no_grad():
            for _ in range(max(1, FAST // batch) if batch > 1 else FAST // 4):
                model(images)

    def ours():
        arguments = ((3, patch, patch), (3, STRIDE, STRIDE))
        OcclusionSensitivity(model).attribute(image, *arguments, target=0)

    def best(run, scale):
        times = side_by_side({b: lambda b=b: run(b) for b in BATCHES}, runs=1, warm_up=0)
        return min((seconds * scale(b), b) for b, seconds in times.items())[1]

    plain_scale = lambda b: count / (FAST // 4 if b == 1 else b * max(1, FAST // b))  # noqa: E731
    plain(8, torch.contiguous_format)
    chosen = {
        "plain": best(lambda b: plain(b, torch.contiguous_format), plain_scale),
        "channels_last": best(lambda b: plain(b, torch.channels_last), plain_scale),
    }
    runs = {
        "plain": lambda: plain(chosen["plain"], torch.contiguous_format),
        "channels_last": lambda: plain(chosen["channels_last"], torch.channels_last),
        "ours": ours,
    }
    chosen["captum"] = best(captum, lambda b: count / some)
    runs["captum"] = lambda: captum(chosen["captum"])
    times = side_by_side(runs, runs=RUNS)
    times["plain"] *= plain_scale(chosen["plain"])
    times["channels_last"] *= plain_scale(chosen["channels_last"])
    times["captum"] *= (count + 1) / (some + 1)  # one pass more, of the clean picture
    return {**times, "limit": flop_limit(model, image, windows) or float("nan"), "windows": count,
            **{f"batch {who}": batch for who, batch in chosen.items()}}  # fmt: skip


def auto_over_full(name: str) -> tuple[int, float, float]:
    """Seconds of a sweep by whole passes, and by what ``engine="auto"`` chooses.

    Of a patch of 32 at a stride of 32, where its trials and what it prepares weigh most; of 8, as above, for networks
    that do the short sweep within two seconds.
    """
    model, image = setting(name)
    side = image.shape[-1]

    def sweep(engine, stride):
        OcclusionSensitivity(model, engine=engine).attribute(image, (3, 32, 32), (3, stride, stride), target=0)

    short = side_by_side({"full": lambda: sweep("full", 32)}, runs=1, warm_up=0)["full"]
    stride, runs = (STRIDE, 3) if short < 2 else (32, 2)
    times = side_by_side(
        {engine: lambda e=engine: sweep(e, stride) for engine in ("full", "auto")}, runs=runs, warm_up=0
    )
    windows = Windows.sliding((3, side, side), (3, 32, 32), (3, stride, stride))
    return len(windows), times["full"], times["auto"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--patches", default="32,16")
    parser.add_argument("--all", action="store_true", help="every torchvision CNN (or --models): auto against full")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    names, patches = arguments.models.split(","), [int(p) for p in arguments.patches.split(",")]
    if arguments.all:
        if arguments.models == ",".join(MODELS):
            names = [n for n in torchvision.models.list_models(module=torchvision.models)
                     if not n.startswith(("vit", "swin", "maxvit"))]  # fmt: skip
        print(machine(), "\n\n| model | windows | full (s) | auto (s) | over full |\n|---|---|---|---|---|")
        for name in names:
            windows, full, auto = auto_over_full(name)
            print(f"| {name} | {windows} | {full:.2f} | {auto:.2f} | {full / auto:.2f} |", flush=True)
        return
    print(machine(), "\n")
    print("| model | patch | windows | captum (s) | plain (s) | channels_last (s) | ours (s) | over the better of "
          "captum and plain | over channels_last | FLOP limit | of the limit |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        for patch in patches:
            t = compare(name, patch)
            first = min([t["captum"], t["plain"]]) / t["ours"]
            second = t["channels_last"] / t["ours"]
            captum = f"{t['captum']:.1f} ({t['batch captum']})"
            print(f"| {name} | {patch} | {t['windows']} | {captum} | {t['plain']:.1f} ({t['batch plain']}) "
                  f"| {t['channels_last']:.1f} ({t['batch channels_last']}) | {t['ours']:.1f} | {first:.2f} "
                  f"| {second:.2f} | {t['limit']:.2f} | {second / t['limit']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
