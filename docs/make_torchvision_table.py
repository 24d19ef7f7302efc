"""Write docs/torchvision.md: how the operations of every torchvision CNN go back.

Each number is counted by running ``Deconvnet.check`` on the model; none is written by hand::

    python docs/make_torchvision_table.py
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
import torchvision
from torch import nn
from torchvision.models import detection, get_model, list_models, segmentation, video

from deconvviz import Deconvnet
from deconvviz.rules import EXACT, GATE, GENERALISED, GRADIENT

PAGE = Path(__file__).with_name("torchvision.md")
SECTIONS: dict[str, ModuleType] = {
    "Classification": torchvision.models,
    "Semantic segmentation": segmentation,
    "Detection: the backbone, with its feature pyramid": detection,
    "Video": video,
}
TRANSFORMERS = ("maxvit", "mvit", "swin", "vit")
SMALLEST = {
    "inception_v3": (1, 3, 75, 75),
    "ssd300_vgg16": (1, 3, 300, 300),
    "mc3_18": (1, 3, 4, 32, 32),
    "r2plus1d_18": (1, 3, 4, 32, 32),
    "r3d_18": (1, 3, 4, 32, 32),
    "s3d": (1, 3, 14, 224, 224),
}
"""Small inputs that a model accepts, where that is not (1, 3, 64, 64)."""

KINDS = (EXACT, GENERALISED, GATE, GRADIENT)
HEAD = """\
# How torchvision's CNNs go back

Made by `python docs/make_torchvision_table.py`, which runs `Deconvnet(model).check(...)` on every model of
torchvision {version} in eval mode. Not in the table: transformers, quantised models and optical flow.

Every operation of every model here has a rule. The columns count a pass's operations by how a signal goes
back through them:

- **exact**: the paper's own rule, for ReLUs and pools;
- **generalised**: the paper's rule carried over to what it did not have. Other rectifiers (ReLU6, which
  PyTorch calls `hardtanh`, and `gelu`, `hardswish`, `silu`) rectify the signal as ReLU does; norms that take
  their statistics from the picture (`layer_norm`, `normalize`) and ConvNeXt's layer scale (`mul`) scale it;
- **constant gate**: squeeze-and-excite and the like, the gate and its product counted apart;
- **gradient**: the plain gradient;
- **linear**: everything else, by its adjoint and so exact: filters, batch norm, sums, concatenations, views.

**What is generalised** names the operations of the second column.
"""


def models(module: ModuleType) -> list[str]:
    """The CNNs that a module of torchvision builds."""
    return [name for name in list_models(module=module) if not name.startswith(TRANSFORMERS)]


def build(name: str, **options: object) -> nn.Module:
    """A model in eval mode with random weights; of a detector, the backbone."""
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", False)  # their truncated normals take long
    if name in models(segmentation) + models(detection):
        options["weights_backbone"] = None
    model = get_model(name, weights=None, **options).eval()
    return model.backbone if name in models(detection) else model


def input_shape(name: str) -> tuple[int, ...]:
    """A small input's shape."""
    return SMALLEST.get(name, (1, 3, 64, 64))


def row(name: str, model: nn.Module) -> str:
    """A line of the table: the model's operations by kind."""
    report = Deconvnet(model).check(torch.zeros(input_shape(name)))
    if not report.supported:
        raise SystemExit(f"{name} has operations without a rule:\n{report}")
    generalised = sorted({o.operation for o in report.operations if o.kind == GENERALISED})
    cells = [f"`{name}`", *(report.counts[kind] for kind in KINDS), report.linear]
    return f"| {' | '.join(map(str, cells))} | {', '.join(f'`{o}`' for o in generalised)} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD.format(version=torchvision.__version__.partition("+")[0])]
    for title, module in SECTIONS.items():
        lines += [f"## {title}", ""]
        lines += [
            f"| model | {' | '.join(KINDS)} | linear | what is generalised |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        lines += [row(name, build(name)) for name in models(module)]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
