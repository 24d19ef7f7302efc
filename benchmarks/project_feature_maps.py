"""64 feature maps of one layer back to pixels: one call of ours against captum one map at a time.

The same units (the centre of each map) from the same images; the results are compared before they are timed.
captum repeats a whole forward and backward pass for each map, so where 64 of them take minutes it is timed
on the first few and scaled: the table says on how many. Its peak memory is that of a loop over all of them
for AlexNet; elsewhere that of two maps, plus the pictures of the other 62 that our call returns.

    python benchmarks/project_feature_maps.py [--quick] [MODEL ...]
"""

from __future__ import annotations

import sys
import warnings

import torch
import torchvision
from captum.attr import NeuronDeconvolution
from measure import machine, peak_memory, report_peak, side_by_side

from deconvviz import Deconvnet

MAPS = 64
LAYERS = {
    "alexnet": ("features.1", "features.7", "features.11"),
    "vgg16": ("features.3", "features.15", "features.29"),
    "resnet50": ("maxpool", "layer2", "layer4"),
}


def setting(name: str, layer: str, batch: int):
    """The model, the images, captum's call for one map and ours for all."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    theirs = NeuronDeconvolution(model, model.get_submodule(layer))
    deconv = Deconvnet(model)
    deconv.close()
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(lambda *a: seen.append(a[2].shape))
    with torch.no_grad():
        model(images[:1])
    hook.remove()
    place = tuple(n // 2 for n in seen[0][2:])

    def captum(maps):
        return [theirs.attribute(images, (m, *place)) for m in maps]

    def ours(maps):
        return deconv.project(layer, list(maps), inputs=images, position=place, seed="one")

    return captum, ours


def looped(name: str) -> int:
    """On how many maps captum's peak memory is measured."""
    return MAPS if name == "alexnet" else 2


def main() -> None:
    quick = "--quick" in sys.argv
    if len(sys.argv) > 4 and sys.argv[1] in ("captum", "ours"):
        who, name, layer, batch = sys.argv[1:5]
        captum, ours = setting(name, layer, int(batch))
        report_peak(lambda: captum(range(looped(name))) if who == "captum" else ours(range(MAPS)))
        return
    print(machine(), "\n")
    print(
        f"| model | layer | batch | captum, {MAPS} maps (s) | timed on | ours (s) | ratio "
        "| captum peak (MiB) | ours peak (MiB) | largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    chosen = [name for name in sys.argv[1:] if name in LAYERS] or LAYERS
    for name, layers in ((name, LAYERS[name]) for name in chosen):
        for batch in (1,) if quick else (1, 8):
            for layer in layers:
                captum, ours = setting(name, layer, batch)
                few = range(MAPS if name == "alexnet" and batch == 1 else 2 if batch == 8 else 4)
                theirs, mine = torch.stack(captum(few), 1), ours(few)
                difference = ((theirs - mine).abs().max() / theirs.abs().max()).item()
                times = side_by_side(
                    {"captum": lambda c=captum, f=few: c(f), "ours": lambda o=ours: o(range(MAPS))},
                    runs=3 if batch == 1 else 1,
                    warm_up=1 if batch == 1 else 0,
                )
                whole = times["captum"] * MAPS / len(few)
                peaks = [peak_memory(__file__, who, name, layer, str(batch)) for who in ("captum", "ours")]
                peaks[0] += (MAPS - looped(name)) * mine[:, 0].nbytes / 2**20
                print(f"| {name} | {layer} | {batch} | {whole:.2f} | {len(few)} maps | {times['ours']:.2f} "
                      f"| {whole / times['ours']:.1f} | {peaks[0]:.0f} | {peaks[1]:.0f} | {difference:.0e} |",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
