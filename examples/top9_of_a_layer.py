"""Figure 2 for any layer, model and folder of pictures: each map's nine strongest units beside their projections.

python examples/top9_of_a_layer.py PHOTOGRAPHS --model resnet18 --weights DEFAULT --layer layer3 --random 8
"""

import argparse
from pathlib import Path

from deconvviz import FilterGrid
from deconvviz.models.zoo import load_model
from deconvviz.plotting import save_figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", type=Path, help="a folder")
    parser.add_argument("--model", default="squeezenet1_1")
    parser.add_argument("--weights", help="DEFAULT, or a state dict's FILE")
    parser.add_argument("--layer", default="features.7")
    parser.add_argument("--random", type=int, default=8, help="draw so many maps, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("top9.png"))
    options = parser.parse_args(arguments)

    loaded = load_model(options.model, options.weights)
    grid = FilterGrid(loaded.model, options.layer).fit(options.pictures, transform=loaded.transform)
    layer, transform = grid[options.layer], loaded.transform
    print(f"{layer.name}: {len(layer)} maps, {len(layer.dead)} of them dead on these pictures")
    figure = layer.figure(random=options.random, seed=options.seed, mean=transform.mean, std=transform.std)
    save_figure(figure, options.out, dpi=200)


if __name__ == "__main__":
    main()
