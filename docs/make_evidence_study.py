"""Write docs/evidence.md: is the strongest map of the last convolutional layer the one that carries the class?

    python docs/make_evidence_study.py WEIGHTS PHOTOGRAPHS RESULTS

``WEIGHTS`` is a state dict of torchvision's ``squeezenet1_0``, ``PHOTOGRAPHS`` a folder with one picture of each
ImageNet class, sorted by class. ``RESULTS`` (.json) keeps what is done, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure

from deconvviz.evidence import Evidence, evidence
from deconvviz.images import load_picture, to_input
from deconvviz.plotting import save_figure

LAYER, EVERY = "features.12", 4

TEXT = """# Is the strongest map the one that matters?

Figure 7 of Zeiler & Fergus shows a picture whose strongest feature map follows a text or a face while the class
follows a wheel or a dog. The conjecture: *the strongest map of the last convolutional layer need not hold the label's
feature; what follows weighs all maps.* We tried it on {count} photographs, one of every fourth ImageNet class, with
SqueezeNet 1.0: [`evidence`](../deconvviz/evidence.py) ablates each of the 512 maps of `{layer}` (its last fire module)
and notes how far the logit of the photograph's true class falls.

**The answer: the conjecture holds. In {first} of {count} photographs ({first_share:.0%}) the strongest map is the one
whose loss costs the class most; in {against} ({against_share:.0%}) losing it costs the class nothing, or helps it.**
Strength is still a hint: a map drawn at random would be the one that matters most in 0.2%.

| | all {count} | the {right} classified correctly |
|---|---|---|
{table}

![For each photograph the rank of its strongest map; and the maps of one photograph](images/evidence.png)

*Left: in how many photographs the strongest map has which rank by effect. Right: the 512 maps for one photograph
({example}); the strongest map is far right, what carries the class is far up.*

How to read it:

- *Rank* 1 means that no other map has a larger effect. Maps of no effect share a rank: about {silent:.0f} of 512 maps
  do nothing for a class, because these weights are the pruned ones of Deep Compression (most weights of the
  classifier are exactly zero). A dense classifier would give these maps some small effect of either sign.
- Activation alone says little of the effect (correlation {plain:.2f}); activation times the map's weight through the
  classifier nearly all (correlation {weighted:.2f}). So to find what a class is seen by, weigh the maps, as Grad-CAM
  does, and then project those: `Deconvnet.project(layer, evidence(...).effect.topk(3).indices)`.
- One map is ablated at a time. What several maps carry together is not seen; the net is one, and small.

Made by `python docs/make_evidence_study.py WEIGHTS PHOTOGRAPHS RESULTS` (torch {torch}, no randomness, {minutes:.0f}
minutes on one core).
"""

ROWS = {
    "the strongest map has the largest effect": lambda r: f"{np.mean(r['rank'] == 1):.1%}",
    "it is among the five largest": lambda r: f"{np.mean(r['rank'] <= 5):.1%}",
    "its effect is zero or negative": lambda r: f"{np.mean(r['effect'] <= 0):.1%}",
    "its share of all that speaks for the class, mean": lambda r: f"{np.mean(r['share']):.1%}",
    "the share of the map that matters most, mean": lambda r: f"{np.mean(r['best_share']):.1%}",
    "that map's rank by activation, median": lambda r: f"{np.median(r['best_rank']):.0f}",
    "maps that together hold half of what speaks for the class, median": lambda r: (
        f"{np.median(r['half']):.0f}"
    ),
}


def measures(found: Evidence) -> dict[str, float]:
    effect, activation = found.effect.double(), found.activation.double()
    positive = effect.clamp(min=0).sort(descending=True).values
    best = int(effect.argmax())
    return {
        "rank": found.rank_of_strongest,
        "effect": float(effect[found.strongest]),
        "share": found.share_of_strongest,
        "best_share": float(positive[0] / positive.sum()),
        "best_rank": 1 + int((activation > activation[best]).sum()),
        "half": 1 + int((positive.cumsum(0) < positive.sum() / 2).sum()),
        "silent": int((effect == 0).sum()),
        "plain": float(np.corrcoef(activation, effect)[0, 1]),
        "weighted": float(np.corrcoef(activation * found.weight, effect)[0, 1]),
    }


def study(model: torch.nn.Module, paths: list[Path], results: Path) -> dict[str, np.ndarray]:
    done = json.loads(results.read_text()) if results.exists() else {}
    for label in range(0, len(paths), EVERY):
        if str(label) not in done:
            start, image = time.perf_counter(), to_input(load_picture(paths[label]))[None]
            found = measures(evidence(model, image, LAYER, label))
            with torch.no_grad():
                found["right"] = int(model(image).argmax()) == label
            done[str(label)] = found | {"seconds": time.perf_counter() - start}
            results.write_text(json.dumps(done))
    rows = list(done.values())
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def draw(ranks: np.ndarray, example: Evidence) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    bars, scatter = figure.subplots(1, 2)
    bins = np.arange(0.5, 61.5)
    bars.hist(np.minimum(ranks, 60), bins, color="tab:blue")
    bars.set_xlabel("rank of the strongest map by effect (60: or beyond)", fontsize=8)
    bars.set_ylabel("photographs", fontsize=8)
    strongest, best = example.strongest, int(example.effect.argmax())
    scatter.axhline(0, color="0.7", linewidth=0.8)
    scatter.scatter(example.activation, example.effect, s=8, alpha=0.6, linewidths=0)
    for number, text, side in (
        (strongest, "the strongest map", "right"),
        (best, "what matters most", "left"),
    ):
        point = float(example.activation[number]), float(example.effect[number])
        scatter.annotate(text, point, (0, 5), textcoords="offset points", ha=side, fontsize=7)
    scatter.margins(0.08, 0.15)
    for axes in (bars, scatter):
        axes.tick_params(labelsize=7)
    scatter.set_xlabel("total activation", fontsize=8)
    scatter.set_ylabel("fall of the true class's logit when ablated", fontsize=8)
    return figure


def main() -> None:
    weights, folder, results = sys.argv[1:]
    model = torchvision.models.squeezenet1_0(weights=None)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    paths = sorted(Path(folder).iterdir())
    found = study(model, paths, Path(results))
    right = {key: values[found["right"]] for key, values in found.items()}
    count, label = len(found["rank"]), 409
    text = TEXT.format(
        count=count,
        layer=LAYER,
        first=int((found["rank"] == 1).sum()),
        first_share=np.mean(found["rank"] == 1),
        against=int((found["effect"] <= 0).sum()),
        against_share=np.mean(found["effect"] <= 0),
        right=len(right["rank"]),
        table="\n".join(f"| {name} | {show(found)} | {show(right)} |" for name, show in ROWS.items()),
        example=paths[label].stem.split("_", 1)[-1].replace("_", " "),
        silent=np.mean(found["silent"]),
        plain=np.mean(found["plain"]),
        weighted=np.mean(found["weighted"]),
        torch=torch.__version__,
        minutes=found["seconds"].sum() / 60,
    )
    example = evidence(model, to_input(load_picture(paths[label]))[None], LAYER, label)
    docs = Path(__file__).parent
    save_figure(draw(found["rank"], example), docs / "images" / "evidence.png", dpi=110)
    (docs / "evidence.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
