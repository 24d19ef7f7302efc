"""Networks that captum projects wrongly, without a word: equal to copies whose plain gradient is the projection.

captum rectifies the signal at ``nn.ReLU`` modules only, by replacing the gradient of the module's input. So
``F.relu``, other activations and gates get the plain gradient, and what else the input feeds is lost.
"""

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from rewritten_networks import gradient, rectifying, with_relu_modules
from torch import nn
from trained_like import pictures, relative_error, trained_like

from deconvviz import Deconvnet, NeuronDeconvnet

FUNCTIONAL = {
    "googlenet": ["maxpool1", "inception3b", "inception4e.branch4", "avgpool"],
    "inception_v3": ["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6a", "Mixed_7c.branch3x3_2a"],
    "densenet121": ["features.denseblock1", "features.transition2.conv", "features.norm5"],
}
GENERALISED = {
    "mobilenet_v2": ["features.1", "features.7", "features.18"],
    "mobilenet_v3_small": ["features.1", "features.4.block.1", "features.12", "classifier.1"],
    "efficientnet_b0": ["features.1", "features.3.0.block.2", "features.8"],
    "convnext_tiny": ["features.0", "features.3.1", "features.7.2.block.5"],
    "regnet_y_400mf": ["stem", "trunk_output.block2.block2-1.f.se", "trunk_output.block4"],
}
SIZES = {"inception_v3": 96}
