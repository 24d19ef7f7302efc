"""Every error deconvviz raises on purpose, under one root.

A message gives the value, what was expected and the remedy. Each kind is also the builtin
exception a caller would guess (``except IndexError`` works), and where captum's callers
expect ``AssertionError``, the kind is one too.
"""


class DeconvvizError(Exception):
    """Root of all errors of this package."""


class UnsupportedModel(DeconvvizError, TypeError, AssertionError):
    """Not something whose forward pass can be watched: no module, scripted, or compiled."""


class UnsupportedOperation(DeconvvizError, RuntimeError):
    """The pass holds an operation that no rule covers."""


class NoForwardPass(DeconvvizError, RuntimeError):
    """There is no recorded pass to project from, or it has gone stale."""


class UnknownLayer(DeconvvizError, LookupError):
    """No layer of the model has this name."""


class AmbiguousLayer(DeconvvizError, LookupError):
    """The layer runs several times in one pass and no call was chosen."""


class LayerNotRun(DeconvvizError, LookupError):
    """The layer exists, but the pass never called it."""


class FeatureMapOutOfRange(DeconvvizError, IndexError):
    """The layer has no such feature map."""


class PositionOutOfRange(DeconvvizError, IndexError):
    """The feature map has no such position."""


class TargetOutOfRange(DeconvvizError, IndexError, AssertionError):
    """The model's output, or the layer's, has no such target or neuron."""


class InvalidInput(DeconvvizError, ValueError, AssertionError):
    """An argument of the wrong type, shape, range or content."""


class OperationFailed(InvalidInput, RuntimeError):
    """An operation of the model rejected its input (a wrong shape, dtype or device)."""


class PictureError(DeconvvizError, ValueError):
    """A file is not a picture that can be shown safely."""


class WeightsError(DeconvvizError, ValueError):
    """A weights file is missing, altered or does not fit the model."""


class CheckpointError(DeconvvizError, ValueError):
    """A checkpoint is damaged, cannot be written, or belongs to another model, layers or data."""


class WindowFailed(DeconvvizError, RuntimeError):
    """The model raised while a part of its input was covered."""


class OtherProcessFailed(DeconvvizError, RuntimeError):
    """Another process failed or ended, so this one stopped too."""
