"""The same feature map by captum's NeuronDeconvolution and by deconvviz, on a network that calls ReLU as a function.

    python examples/compare_with_captum.py PICTURE --weights DEFAULT --out beside_captum.png

captum replaces the gradient of ``nn.ReLU`` modules; GoogLeNet has none, so what it returns there is the plain gradient.
"""

import argparse
from pathlib import Path

from captum.attr import NeuronDeconvolution, NeuronGradient

from deconvviz import Deconvnet, NeuronDeconvnet
from deconvviz.images import displayable, load_picture, to_pixels
from deconvviz.models.zoo import load_model
from deconvviz.plotting import panel, save_figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="googlenet")
    parser.add_argument("--weights", help="DEFAULT, or a state dict's FILE")
    parser.add_argument("--layer", default="inception4a")
    parser.add_argument("--unit", type=int, nargs=3, help="map, y, x; default: the strongest map where it is strongest")
    parser.add_argument("--out", type=Path, default=Path("beside_captum.png"))
    options = parser.parse_args(arguments)

    loaded = load_model(options.model, options.weights)
    image = loaded.transform(load_picture(options.picture))[None]
    module, unit = loaded.model.get_submodule(options.layer), options.unit
    if unit is None:
        deconv = Deconvnet(loaded.model)
        fmap = int(deconv.strongest(module, inputs=image))
        unit = (fmap, *deconv.strongest_position(module, fmap, inputs=image)[0])
    methods = {
        "deconvviz": NeuronDeconvnet(loaded.model, module),
        "captum's deconvolution": NeuronDeconvolution(loaded.model, module),
        "captum's plain gradient": NeuronGradient(loaded.model, module),
    }
    maps = {name: method.attribute(image.clone(), tuple(unit))[0].detach() for name, method in methods.items()}
    ours, theirs, gradient = maps.values()
    print(f"captum's deconvolution is {(theirs - ours).norm() / ours.norm():.0%} off the deconvnet,")
    print(f"and {(theirs - gradient).norm() / gradient.norm():.0%} off the plain gradient")
    picture = to_pixels(image[0], loaded.transform.mean, loaded.transform.std)
    save_figure(panel([[picture, *map(displayable, maps.values())]], ["picture", *maps]), options.out)


if __name__ == "__main__":
    main()
