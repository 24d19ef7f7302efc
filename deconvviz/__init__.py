"""deconvviz: see what a CNN has learned.

The deconvnet of Zeiler & Fergus, *Visualizing and Understanding Convolutional Networks*
(arXiv 1311.2901), for any torchvision CNN, as released, beside captum.

The package, from what users call down to single steps (imports only go down)::

    cli, commands, demo     the command line, what each command does, the demo page
    evolution               FeatureEvolution: features through training; its result in evolution_result
    occlusion               OcclusionSensitivity
    deconvnet, comparison   Deconvnet, NeuronDeconvnet; a projection beside captum's methods
    filter_grid             FilterGrid: every map's strongest units over a data set, projected
    explorer                a grid as a page to browse
    grid_layer, feature_map a grid's results
    diagnostics             dead, grey, duplicate and aliased filters
    invariance              features under translation, scale and rotation
    correspondence          are the same parts treated alike
    evidence                which feature maps carry a class
    sweep                   many windows through a model: engine, batch size, failures
    clean_passes            the passes that can be computed again in part
    incremental             exact re-inference of only what a patch changed
    windows, fills, shards  what is covered, by what, and by which process
    unit_projection         single units, each from the crop that it sees
    mining                  one pass over a data set: the strongest units, resumable and mergeable
    geometry                receptive fields of any graph's units
    projection              signals back to the pixels, many at a time
    capture                 watch a forward pass, then leave the model as it was found
    layers                  find a layer by name, module or call
    rules                   how a signal goes back through each operation: one table
    switches                where each max fell; put a signal back there
    tape                    what a pass did, as a straight-line program
    targets, inputs, images captum's targets; checks; pictures in and out
    model_zoo, weights_file a model by its name; weights from a file, safely
    models                  the paper's networks and their ablations
    plotting                matplotlib figures of results, which call it and which it does not import
    spectrum                a kernel's energy over frequencies
    errors                  DeconvvizError and its kinds
"""

from deconvviz.deconvnet import CheckReport, Deconvnet, NeuronDeconvnet
from deconvviz.errors import DeconvvizError
from deconvviz.filter_grid import FilterGrid
from deconvviz.occlusion import OcclusionSensitivity

__version__ = "0.1.0"
__all__ = [
    "CheckReport",
    "Deconvnet",
    "DeconvvizError",
    "FilterGrid",
    "NeuronDeconvnet",
    "OcclusionSensitivity",
]
