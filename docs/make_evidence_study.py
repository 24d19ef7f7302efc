"""Write docs/evidence_study.md: is the strongest map of the last convolutional layer the one that carries the class?

    python docs/make_evidence_study.py WEIGHTS PHOTOGRAPHS RESULTS

``WEIGHTS`` is a state dict of torchvision's ``squeezenet1_0``, ``PHOTOGRAPHS`` a folder with one picture of each
ImageNet class, sorted by class; SqueezeNet 1.1 comes with the ``demo`` extra. ``RESULTS`` is a folder that keeps what
is done, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from deconvviz.demo.data import demo_model
from deconvviz.evidence import Evidence, evidence
from deconvviz.images import load_picture, to_input
from deconvviz.models.zoo import load_model
from deconvviz.plotting import save_figure

LAYER, EVERY, EXAMPLE = "features.12", 4, 409

TEXT = """# Is the strongest map the one that matters?

Figure 7 of Zeiler & Fergus shows a picture whose strongest feature map follows a text or a face while the class
follows a wheel or a dog. The conjecture: *the strongest map of the last convolutional layer need not hold the label's
feature; what follows weighs all maps.* We tried it on {count} photographs, one of every fourth ImageNet class, with two
trained networks: SqueezeNet 1.0 (pruned by Deep Compression, so most weights of its classifier are exactly zero) and
SqueezeNet 1.1 (dense). [`evidence`](evidence.md) ablates each of the 512 maps of `{layer}`, the last fire
module, and notes how far the logit of the photograph's true class falls.

**The answer: the strongest map need not be the one that matters, and how often it is depends on the network.** Its loss
costs the class most in {first_pruned:.0%} of the photographs with the pruned network and in {first_dense:.0%} with the
dense one; it costs the class nothing, or helps it, in {against_pruned:.0%} and {against_dense:.0%}. And even where it
comes first, it is a small part of what speaks for the class: what follows weighs many maps, as conjectured. (A map
drawn at random would come first in 0.2%.)

| | 1.0, pruned: all {count} | {right_pruned} classified correctly | 1.1, dense: all {count} | {right_dense} correctly |
|---|---|---|---|---|
{table}

![For each photograph the rank of its strongest map; and the maps of one photograph](images/evidence.png)

*Left: in how many photographs the strongest map has which rank by effect. Right: the 512 maps of the pruned network for
one photograph ({example}); what is strong is far right, what carries the class is far up.*

How to read it:

- *Rank* 1 means that no other map has a larger effect. Maps of no effect share a rank: in the pruned network that is
  {silent_pruned:.0f} of 512 maps for a class, in the dense one {silent_dense:.0f}.
- Activation alone says part of the effect (correlation {plain_pruned:.2f} and {plain_dense:.2f}); activation times
  the map's weight through the classifier nearly all (correlation {weighted_pruned:.2f} and {weighted_dense:.2f}). So to
  find what a class is seen by, weigh the maps, as Grad-CAM does, and then project those: `found = evidence(...)`, then
  `Deconvnet(model).project(layer, found.effect.topk(3).indices.tolist(), inputs=image)`.
- One map is ablated at a time. What several maps carry together is not seen; both networks are small and alike.

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
    "maps that together hold half of what speaks for the class, median": lambda r: f"{np.median(r['half']):.0f}",
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
    results.parent.mkdir(parents=True, exist_ok=True)
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


def draw(ranks: dict[str, np.ndarray], example: Evidence) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    bars, scatter = figure.subplots(1, 2)
    bars.hist([np.minimum(r, 60) for r in ranks.values()], np.arange(0.5, 61.5, 3), label=list(ranks))
    bars.legend(fontsize=7, frameon=False)
    bars.set_xlabel("rank of the strongest map by effect, in threes (60: or beyond)", fontsize=8)
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
    pruned = load_model("squeezenet1_0", weights).model
    nets = {"pruned": pruned, "dense": demo_model()}
    paths = sorted(Path(folder).iterdir())
    found = {name: study(net, paths, Path(results) / f"{name}.json") for name, net in nets.items()}
    right = {name: {key: v[f["right"]] for key, v in f.items()} for name, f in found.items()}
    columns = [part[name] for name in nets for part in (found, right)]
    numbers: dict[str, float] = {}
    for name, f in found.items():
        numbers |= {f"{key}_{name}": f[key].mean() for key in ("silent", "plain", "weighted")}
        numbers[f"first_{name}"] = np.mean(f["rank"] == 1)
        numbers[f"against_{name}"] = np.mean(f["effect"] <= 0)
        numbers[f"right_{name}"] = int(f["right"].sum())
    text = TEXT.format(
        count=len(found["pruned"]["rank"]),
        layer=LAYER,
        table="\n".join(f"| {row} | {' | '.join(map(show, columns))} |" for row, show in ROWS.items()),
        example=paths[EXAMPLE].stem.split("_", 1)[-1].replace("_", " "),
        torch=torch.__version__,
        minutes=sum(f["seconds"].sum() for f in found.values()) / 60,
        **numbers,
    )
    example = evidence(nets["pruned"], to_input(load_picture(paths[EXAMPLE]))[None], LAYER, EXAMPLE)
    docs = Path(__file__).parent
    ranks = {f"SqueezeNet {v}, {name}": found[name]["rank"] for name, v in (("pruned", "1.0"), ("dense", "1.1"))}
    save_figure(draw(ranks, example), docs / "images" / "evidence.png", dpi=110)
    (docs / "evidence_study.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
