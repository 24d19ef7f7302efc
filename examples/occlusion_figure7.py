"""Figure 7: what a feature map and the class do while a grey patch moves over a picture; a row a picture.

python examples/occlusion_figure7.py cat.jpg dog.jpg --model squeezenet1_1 --weights DEFAULT --layer features.12
"""

import argparse
from pathlib import Path

from deconvviz import OcclusionSensitivity
from deconvviz.images import load_picture
from deconvviz.models.zoo import load_model
from deconvviz.plotting import save_figure
from deconvviz.plotting.occlusion import figure7


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model", default="squeezenet1_1")
    parser.add_argument("--weights", help="DEFAULT, or a state dict's FILE")
    parser.add_argument("--layer", default="features.12")
    parser.add_argument("--patch", type=int, default=48)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("figure7"), help="folder, with a figure for each picture")
    options = parser.parse_args(arguments)

    loaded = load_model(options.model, options.weights)
    occlusion, transform = OcclusionSensitivity(loaded.model), loaded.transform
    for path in options.pictures:
        image = transform(load_picture(path))[None]
        maps = occlusion.maps(image, options.patch, options.stride, options.layer)
        label, clean = int(maps.targets[0, 0]), float(maps.clean_scores[0, 0])
        name = loaded.categories[label] if loaded.categories else label
        scores, totals = maps.score_cells[0, 0], maps.activation_cells[0]
        centre = [maps.boxes.flatten(0, 1)[int(cells.argmin())].view(2, 2).sum(1) // 2 for cells in (scores, totals)]
        print(
            f"{path.stem}: class {name}, {clean:.3f}, falls to {float(scores.min()):.3f} with the patch at "
            f"{tuple(centre[0].tolist())}; map {int(maps.fmaps[0])} falls by "
            f"{1 - float(totals.min() / maps.clean_activation[0]):.0%} at {tuple(centre[1].tolist())}; "
            f"{float((maps.label_cells[0, 0] != label).float().mean()):.1%} of the places change the label"
        )
        figure = figure7(maps, 0, loaded.categories, mean=transform.mean, std=transform.std)
        save_figure(figure, options.out / f"{path.stem}.png")


if __name__ == "__main__":
    main()
