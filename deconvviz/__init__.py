"""deconvviz: see what a CNN has learned.

The deconvnet of Zeiler & Fergus, *Visualizing and Understanding Convolutional Networks*
(arXiv 1311.2901), for any torchvision CNN, as released, beside captum.

The package, from what users call down to single steps (imports only go down)::

    cli, demo               the command line, one file a command; the demo page
    evolution               FeatureEvolution: features through training
    filter_grid             FilterGrid: every map's strongest units over a data set, projected
    explorer                a grid as a page to browse
    diagnostics             dead, grey, duplicate and aliased filters
    invariance              features under translation, scale and rotation
    correspondence          are the same parts treated alike
    evidence                which feature maps carry a class
    comparison              a projection beside captum's methods and shuffled weights
    occlusion               OcclusionSensitivity: windows, what covers them, engines, figure 7
    deconvnet, check        Deconvnet, NeuronDeconvnet; how each operation goes back
    grid                    a grid's results, and units projected from the crops that they see
    units, targets          which units a projection starts from; captum's targets and selectors
    mining                  one pass over a data set: the strongest units, resumable and mergeable
    incremental             exact re-inference of only what a patch changed
    features                the outputs of some layers
    projection, boxes       signals back to the pixels, many at a time; those that fill a box
    geometry                receptive fields of any graph's units
    capture                 watch a forward pass, then leave the model as it was found
    layers, inputs          find a layer by name, module or call; check what a model is given
    shards                  work shared among processes
    rules                   how a signal goes back through each operation: one table
    switches                where each max fell; put a signal back there
    tape                    what a pass did, as a straight-line program
    models                  the paper's networks; a model by its name, weights from a file, safely
    plotting, templates     figures and pages of results, which call them and which they do not import
    images                  pictures in and out
    memory, precision       what memory is left; float32 for sums, float64 where a device has it
    files                   a file that is whole or not there
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
